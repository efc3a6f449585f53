"""LSH attention: what it sees, what it approximates, and its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import HEADS, WIDTH, Case, make_block, make_layer, make_qkv, relative
from torch import Tensor

import vitcmp
from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, TokenGrid, attention_map
from vitcmp.models.vit import resized


def seen_by_round(q: Tensor, rotations: Tensor, bucket_size: int) -> Tensor:
    """[R, N, N] for one head, q of [N, K]: whether token i sees token j in round r."""
    tokens = len(q)
    rounds = []
    for rotation in rotations.to(q.dtype):
        if rotation.shape[1] == 0:
            rounds.append(torch.ones(tokens, tokens, dtype=torch.bool))
            continue
        rotated = q @ rotation
        bucket = torch.cat([rotated, -rotated], dim=1).argmax(dim=1)
        in_order = sorted(range(tokens), key=lambda i: int(bucket[i]) * tokens + i)
        chunk = torch.empty(tokens, dtype=torch.int64)
        for slot, token in enumerate(in_order):
            chunk[token] = slot // bucket_size
        before = (chunk - 1) % -(-tokens // bucket_size)
        in_reach = (chunk[:, None] == chunk) | (before[:, None] == chunk)
        rounds.append(in_reach & (bucket[:, None] == bucket))
    return torch.stack(rounds)


def shared_qk_scores(q: Tensor) -> Tensor:
    """Scores of one head, q of [N, K]; a token's score with itself is -1e5."""
    keys = torch.stack([row / row.norm() for row in q])
    scores = q @ keys.T / q.shape[1] ** 0.5
    return torch.where(torch.eye(len(q), dtype=torch.bool), -1e5, scores)


def shared_qk_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = zip(q.flatten(0, 1), v.flatten(0, 1), strict=True)
    return torch.stack([shared_qk_scores(qh).softmax(dim=1) @ vh for qh, vh in heads]).view_as(q)


def reformer_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Appendix A of the paper, head by head: a pair is discounted in each round by the log of its rounds."""
    heads = []
    for qh, vh in zip(q.flatten(0, 1), v.flatten(0, 1), strict=True):
        seen = seen_by_round(qh.detach(), core.rotations, core.bucket_size)
        discounted = shared_qk_scores(qh) - seen.sum(dim=0).clamp(min=1).to(q.dtype).log()
        z, outputs = [], []
        for visible in seen:
            scores = torch.where(visible, discounted, -torch.inf)
            outputs.append(scores.softmax(dim=1) @ vh)
            z.append(scores.logsumexp(dim=1, keepdim=True))
        shares = torch.stack(z).softmax(dim=0)  # exp(z_r - z)
        heads.append((shares * torch.stack(outputs)).sum(dim=0))
    return torch.stack(heads).view_as(q)


CASES = [Case(spec, reformer_twin) for spec in ("reformer", "reformer:num_hashes=1")]


@pytest.mark.parametrize(
    ("tokens", "spec"),
    [
        (64, "reformer:bucket_size=8,num_hashes=2"), (64, "reformer:bucket_size=32"),  # two chunks see each other
        (65, "reformer:bucket_size=8,num_hashes=8"), (65, "reformer:bucket_size=22,num_hashes=3"),  # three chunks
        (66, "reformer:bucket_size=65,num_hashes=2"), (197, "reformer:bucket_size=16,num_hashes=2"),
    ],
)  # fmt: skip
def test_reformer_equals_its_twin_at_any_size(tokens: int, spec: str) -> None:
    core = make_block(spec, make_layer(tokens)).core.double()
    q, _, v = (x.requires_grad_() for x in make_qkv(tokens))
    # Small and alike queries fill few buckets, of many chunks.
    for q_ in (q, 0.2 * q + 1):
        results = []
        for y in (core(q_, q_, v), reformer_twin(core, q_, q_, v)):
            upstream = torch.ones_like(y) + torch.arange(y.numel()).view_as(y) % 7
            results.append((y, *torch.autograd.grad(y, (q, v), upstream, retain_graph=True)))
        for found, wanted in zip(*results, strict=True):
            assert relative(found, wanted) < 1e-10


@pytest.mark.parametrize("tokens", [1, 2, 17, 65])
def test_one_bucket_is_dense_shared_qk_attention(tokens: int) -> None:
    core = make_block(f"reformer:bucket_size={tokens}", make_layer(tokens)).core.double()
    q, _, v = (x.requires_grad_() for x in make_qkv(tokens))
    found, wanted = core(q, q, v), shared_qk_twin(core, q, q, v)
    assert relative(found, wanted) < 1e-10
    if tokens > 2:
        pairs = (torch.autograd.grad(y.square().sum(), (q, v)) for y in (found, wanted))
        assert all(relative(f, w) < 1e-10 for f, w in zip(*pairs, strict=True))


def test_reformer_nears_dense_shared_qk_attention_as_rounds_grow() -> None:
    q, _, v = make_qkv(197, std=2)
    wanted = shared_qk_twin(None, q, q, v)
    errors = []
    for rounds in (1, 4, 16, 64):
        core = make_block(f"reformer:bucket_size=16,num_hashes={rounds}", make_layer(197)).core.double()
        errors.append(relative(core(q, q, v), wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4, errors


def test_a_pair_seen_twice_counts_once() -> None:
    """The same rotations in both rounds: they show the same pairs, so the answer is that of one."""
    q, _, v = make_qkv(64)
    once = make_block("reformer:bucket_size=8,num_hashes=1", make_layer(64)).core.double()
    twice = make_block("reformer:bucket_size=8,num_hashes=2", make_layer(64)).core.double()
    twice.rotations.copy_(once.rotations.expand_as(twice.rotations))
    assert relative(twice(q, q, v), once(q, q, v)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_alone_attends_to_itself(dtype: torch.dtype) -> None:
    core = make_block("reformer:bucket_size=8,num_hashes=2", make_layer(16)).core
    q, _, v = make_qkv(16, dtype=torch.float32)
    core.rotations.zero_()
    core.rotations[:, 0, 0] = 1  # two buckets, by the sign of the first channel
    q[..., 0] = -q[..., 0].abs()
    q[:, :, 5, 0] = 3
    core, q, v = core.to(dtype), q.to(dtype), v.to(dtype)
    assert torch.equal(core(q, q, v)[:, :, 5], v[:, :, 5])
    matrix = attention_map(core, q, q)
    others = torch.arange(16) != 5
    assert (matrix[:, :, 5, others] == 0).all()
    assert (matrix[:, :, others][..., 5] == 0).all()
    assert (matrix.diagonal(dim1=-2, dim2=-1)[..., others] == 0).all()


def test_reformer_sees_its_own_bucket_only() -> None:
    core = make_block("reformer", make_layer(65)).core.double()
    q, _, _ = make_qkv(65)
    matrix = attention_map(core, q, q)
    for qh, found in zip(q.flatten(0, 1), matrix.flatten(0, 1), strict=True):
        seen = seen_by_round(qh, core.rotations, core.bucket_size).any(dim=0)
        assert (found[~seen] == 0).all()


def test_reformer_draws_rotations_from_its_seed() -> None:
    core, other = (make_block("reformer", make_layer(65), seed=seed).core for seed in (0, 1))
    assert core.rotations.shape == (4, WIDTH, 9)  # chunks of 4 tokens are 17, and buckets an even number
    assert not torch.equal(core.rotations, other.rotations)
    for x in (core, other):
        x.reset_random_state(7)
    assert torch.equal(core.rotations, other.rotations)


@pytest.mark.parametrize(
    ("tokens", "hashes", "expected"),
    [(1, 4, (1, 1, 1)), (2, 1, (1, 2, 1)), (15, 4, (1, 1, 15)), (17, 4, (4, 18, 1)), (64, 4, (4, 16, 4)),
     (197, 4, (4, 18, 12)), (1025, 4, (4, 18, 64)), (4097, 4, (4, 66, 64))],
)  # fmt: skip
def test_auto_looks_at_half_of_the_tokens_at_most(tokens: int, hashes: int, expected: tuple[int, int, int]) -> None:
    from vitcmp.attention.reformer import Config, sizes

    assert sizes(make_layer(TokenGrid(1, tokens)), Config(num_hashes=hashes)) == expected


def test_reformer_follows_a_new_image_size() -> None:
    settings = dict(attention="reformer", channels=1, patch_size=1)
    model = resized(vitcmp.build_model("tiny", image_size=8, **settings), 12)
    assert model.blocks[0].attention.core.rotations.shape[-1] == 8  # 144 tokens in chunks of 9
    assert model(torch.zeros(1, 1, 12, 12)).shape == (1, 10)


def test_reformer_warns_where_it_cannot_win() -> None:
    with pytest.warns(DegenerateWarning, match="4 rounds x 16 slots = 64 for 64 tokens"):
        attention.load("reformer:bucket_size=8").build(make_layer(64))


@pytest.mark.parametrize(
    ("options", "reason"),
    [("num_hashes=0", "num_hashes"), ("bucket_size=0", "bucket_size"), ("bucket_size=18", r"\(18\).*17 tokens")],
)
def test_reformer_refuses_impossible_sizes(options: str, reason: str) -> None:
    with pytest.raises(AttentionError, match=reason):
        attention.load(f"reformer:{options}").build(make_layer())


def test_reformer_has_three_projections() -> None:
    block = make_block("reformer")
    assert not hasattr(block, "k")
    assert block.num_heads == HEADS
