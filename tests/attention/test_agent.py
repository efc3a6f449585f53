"""Agent attention: pooling, biases, the convolution after the map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, merge_heads, project, relative
from torch import Tensor

import vitcmp
from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map
from vitcmp.models.vit import resized


def cells(x: Tensor, grid: TokenGrid, agents: TokenGrid) -> Tensor:
    """[N, K] -> [n, K]: means over the cells of the patches, the first rows and columns of cells the larger ones."""
    image = x[grid.num_prefix_tokens :].reshape(grid.height, grid.width, -1)
    rows = image.tensor_split(agents.height, dim=0)
    return torch.stack([cell.mean(dim=(0, 1)) for row in rows for cell in row.tensor_split(agents.width, dim=1)])


def bias_of_tokens(bias: Any, grid: TokenGrid) -> Tensor:
    """[H, n, N], token by token."""
    prefix = [bias.prefix[..., t] for t in range(grid.num_prefix_tokens)]
    patches = [bias.rows[..., i] + bias.columns[..., j] for i in range(grid.height) for j in range(grid.width)]
    return torch.stack(prefix + patches, dim=-1)


def agent_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, with the N x N matrix."""

    def weights(scores: Tensor) -> Tensor:
        return scores.exp() / scores.exp().sum(dim=1, keepdim=True)

    scale, out = q.shape[-1] ** -0.5, torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            a = cells(q[b, h], core.grid, core.agents)
            collect, read = a @ k[b, h].T * scale, q[b, h] @ a.T * scale
            if core.collect_bias is not None:
                collect = collect + bias_of_tokens(core.collect_bias, core.grid)[h]
                read = read + bias_of_tokens(core.read_bias, core.grid)[h].T
            out[b, h] = (weights(read) @ weights(collect)) @ v[b, h]
    return out


def agent_block_twin(block: Any, x: Tensor) -> Tensor:
    """The convolution as a sum over its taps of shifted images; nothing for prefix tokens."""
    q, k, v = project(block, x)
    grid, conv = block.core.grid, block.after.convolution.conv
    kernel, half = conv.weight[:, 0], conv.weight.shape[-1] // 2  # [D, size, size]
    image = merge_heads(v)[:, grid.num_prefix_tokens :].unflatten(1, (grid.height, grid.width))  # [B, h, w, D]
    bordered = image.new_zeros(len(x), grid.height + 2 * half, grid.width + 2 * half, image.shape[-1])
    bordered[:, half : half + grid.height, half : half + grid.width] = image
    convolved = conv.bias.expand_as(image)
    for i in range(2 * half + 1):
        for j in range(2 * half + 1):
            convolved = convolved + bordered[:, i : i + grid.height, j : j + grid.width] * kernel[:, i, j]
    prefix = convolved.new_zeros(len(x), grid.num_prefix_tokens, image.shape[-1])
    return block.out(merge_heads(agent_twin(block.core, q, k, v)) + torch.cat([prefix, convolved.flatten(1, 2)], dim=1))


CASES = [
    Case("agent", agent_twin, agent_block_twin),
    Case("agent:bias=false,conv_kernel_size=5", agent_twin, agent_block_twin),
    Case("agent:bias=false,conv_kernel_size=0,num_agents=1", agent_twin),
]


@pytest.mark.parametrize(
    ("grid", "limit", "agents"),
    [
        (TokenGrid(14, 14, 1), "auto", (7, 7)),
        (TokenGrid(32, 32, 1), "auto", (7, 7)),
        (TokenGrid(8, 8), "auto", (4, 4)),
        (TokenGrid(1, 1, 1), "auto", (1, 1)),
        (TokenGrid(5, 7), "auto", (2, 4)),
        (TokenGrid(1, 17), "auto", (1, 4)),
        (TokenGrid(17, 1), "auto", (4, 1)),
        (TokenGrid(14, 14), 13, (4, 3)),
        (TokenGrid(14, 14), 10, (3, 3)),
        (TokenGrid(4, 9), 36, (4, 9)),
        (TokenGrid(9, 4, 1), 1, (1, 1)),
    ],
)
def test_agents_lie_on_the_nearest_grid(grid: TokenGrid, limit: int | str, agents: tuple[int, int]) -> None:
    layer = LayerConfig(32, 2, grid)
    if limit == grid.height * grid.width:
        with pytest.warns(DegenerateWarning, match="36 agents for 36 patches"):
            core = attention.load(f"agent:num_agents={limit}").build(layer).core
    else:
        core = attention.load(f"agent:num_agents={limit}").build(layer).core
    assert (core.agents.height, core.agents.width) == agents


def test_one_agent_gives_every_query_the_same() -> None:
    core = make_block("agent:num_agents=1", make_layer(TokenGrid(4, 4, 1))).core.double()
    q, k, _ = make_qkv(17)
    matrix = attention_map(core, q, k)
    assert (matrix - matrix[..., :1, :]).abs().max() < 1e-12


def test_the_map_has_the_rank_of_the_agents() -> None:
    core = make_block("agent", make_layer(TokenGrid(8, 8))).core.double()
    q, k, _ = make_qkv(64)
    assert (torch.linalg.matrix_rank(attention_map(core, q, k)) == 16).all()


def test_biases_start_small_and_from_their_seed() -> None:
    models = [
        vitcmp.build_model("tiny", attention="agent", image_size=8, channels=1, pool="cls", seed=3) for _ in range(2)
    ]
    cores = [model.blocks[0].attention.core for model in models]
    assert torch.equal(cores[0].read_bias.rows, cores[1].read_bias.rows)
    assert relative(cores[0].read_bias.rows, cores[0].collect_bias.rows) > 1
    for bias in cores[0].parameters():
        assert 0.01 < float(bias.detach().std()) < 0.03
    assert not list(attention.load("agent:bias=false").build(make_layer()).core.parameters())


def test_biases_follow_another_resolution() -> None:
    model = vitcmp.build_model("tiny", attention="agent:num_agents=16", image_size=8, channels=1, pool="cls")
    core = model.blocks[0].attention.core
    with torch.no_grad():
        core.read_bias.rows.copy_(torch.linspace(-1, 1, 8).expand_as(core.read_bias.rows))
    larger = resized(model, 16)
    new = larger.blocks[0].attention.core
    assert relative(new.collect_bias.prefix, core.collect_bias.prefix) < 1e-6
    assert new.collect_bias.columns.shape == (4, 16, 16)
    assert (new.read_bias.rows[..., 1:-1].diff() - 1 / 7).abs().max() < 1e-6  # linear, at half the step
    assert larger(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_agents_of_another_resolution_take_over_from_their_neighbours() -> None:
    """The default's 16 agents become 49; a bias that rises over the image still does."""
    model = vitcmp.build_model("tiny", attention="agent", image_size=8, channels=1, pool="cls")
    bias = model.blocks[0].attention.core.collect_bias
    with torch.no_grad():
        bias.prefix.copy_(torch.arange(4.0).repeat_interleave(4)[:, None].expand_as(bias.prefix))  # by agents' row
    prefix = resized(model, 16).blocks[0].attention.core.collect_bias.prefix.detach()[..., 0].unflatten(-1, (7, 7))
    assert (prefix - prefix[..., :1]).abs().max() < 1e-5
    assert bool((prefix[..., 0].diff() > 0).all())


def test_sizes_that_cannot_work_are_named() -> None:
    for options, match in {
        "num_agents=17": r"num_agents \(17\) .* patches \(16\)",
        "num_agents=0": r"num_agents \(0\)",
        "conv_kernel_size=2": r"conv_kernel_size \(2\) must be odd",
    }.items():
        with pytest.raises(AttentionError, match=match):
            attention.load(f"agent:{options}").build(make_layer(TokenGrid(4, 4, 1)))
