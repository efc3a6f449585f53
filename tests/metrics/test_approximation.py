"""Errors of approximations: exact where they must be, on random inputs and on what trained models read."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from vitcmp import attention, load_data
from vitcmp.attention import AttentionError, TokenGrid, attention_map
from vitcmp.configs import RuntimeConfig, UserError, resolve_run
from vitcmp.data.augment import Normalise
from vitcmp.metrics import approximation
from vitcmp.metrics.approximation import Inputs, cores_for, errors, random_inputs, run_inputs, target
from vitcmp.metrics.memory import PeakMemory
from vitcmp.models.checkpoint import Run, load_run
from vitcmp.workflows import train

SMALL = {"dim": 32, "num_heads": 2, "depth": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("results"))


def trained(results: str, spec: str, **settings: Any) -> Run:
    config = resolve_run({**SMALL, "attention": spec, "epochs": 1, "train_samples": 128, **settings})
    return load_run(train.run(config, RuntimeConfig(results=results)).id, results)


@pytest.fixture(scope="module")
def softmax_run(results: str) -> Run:
    return trained(results, "softmax", pool="cls")


@pytest.fixture(scope="module")
def linformer_run(results: str) -> Run:
    return trained(results, "linformer:proj_dim=16")


def images(count: int = 3) -> Tensor:
    return load_data("digits").test.images[:count]


def shared(inputs: Inputs) -> Inputs:
    return Inputs([(q, q, v) for q, _, v in inputs.layers], inputs.source)


@pytest.mark.parametrize("impl", ["naive", "fused"])
def test_softmax_is_no_way_from_softmax(impl: str) -> None:
    inputs = random_inputs(2, 2, 33, 16, std=2)
    found = errors(cores_for(f"softmax:impl={impl}", inputs), inputs, target("softmax"), with_map=True)
    assert found.output < 1e-6
    assert found.map is not None
    assert found.map < 1e-6
    assert found.uniform > 0.5


@pytest.mark.parametrize("name", ["softmax", "shared-qk"])
def test_the_target_in_blocks_is_the_target(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_inputs(2, 2, 33, 16).layers[0]
    whole = target(name)(q, k, v)
    monkeypatch.setattr(approximation, "BLOCK", 5 * q.shape[:-1].numel())
    torch.testing.assert_close(target(name)(q, k, v), whole)


@pytest.mark.parametrize("tokens", [2, 17, 64])
def test_one_bucket_is_shared_qk_attention(tokens: int) -> None:
    inputs = shared(random_inputs(2, 2, tokens, 16))
    cores = cores_for(f"reformer:bucket_size={tokens}", inputs)
    found = errors(cores, inputs, target("shared-qk"), with_map=True)
    assert max(found.output, found.map or 0) < 1e-5


def test_the_keys_of_shared_qk_are_the_queries() -> None:
    found = approximation.metrics("reformer:bucket_size=17", random_inputs(1, 2, 17, 16))
    assert found["error_target"] == "shared-qk"
    assert found["output_error"] < 1e-5


def test_more_features_bring_performer_nearer() -> None:
    inputs = random_inputs(4, 4, 64, 16, std=0.5)
    found = [approximation.metrics(f"performer:num_features={m},eps=0", inputs) for m in (64, 512, 4096)]
    for name in ("output_error", "map_error"):
        values = [metrics[name] for metrics in found]
        # Monte Carlo: 8 times the features, about 1 / sqrt(8) of the error.
        assert all(later < 0.6 * earlier for earlier, later in pairwise(values)), values
    assert values[-1] < 0.1


def test_as_many_landmarks_as_tokens_are_near_softmax() -> None:
    inputs = random_inputs(2, 2, 32, 16)
    few, many = (
        approximation.metrics(f"nystromformer:num_landmarks={m},pinv_iterations=20", inputs)["output_error"]
        for m in (4, 32)
    )
    assert many < 1e-3 < few


@pytest.mark.parametrize("spec", ["performer", "linformer:sharing=none", "nystromformer"])
def test_errors_in_blocks_equal_those_of_whole_maps(spec: str) -> None:
    inputs = random_inputs(3, 2, 37, 16)
    ((q, k, v),) = inputs.layers
    (core,) = cores_for(spec, inputs)
    found = errors([core], inputs, target("softmax"), with_map=True)
    with torch.no_grad():
        ours, exact = attention_map(core, q, k), (q @ k.transpose(-2, -1) / 4).softmax(dim=-1)
    assert found.map == pytest.approx(((ours - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert found.output == pytest.approx(((ours @ v - exact @ v).norm() / (exact @ v).norm()).item(), rel=1e-4)


def test_the_uniform_error_of_two_tokens() -> None:
    """Scores ln 3 and 0 give weights 3/4 and 1/4; values 1 and 0 then 3/4 and 1/4, where the mean is 1/2 for both."""
    q = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1) * math.log(3) / 2
    k, v = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    found = errors(cores_for("softmax", Inputs([(q, k, v)], "")), Inputs([(q, k, v)], ""), target("softmax"))
    assert found.uniform == pytest.approx(math.sqrt((2 / 16) / (10 / 16)))
    assert found.map is None


@pytest.mark.parametrize("std", [0.5, 1.0])
@pytest.mark.parametrize("width", [16, 64])
def test_random_scores_have_the_stated_spread(std: float, width: int) -> None:
    inputs = random_inputs(2, 4, 512, width, std)
    ((q, k, _),) = inputs.layers
    assert (q @ k.transpose(-2, -1) * width**-0.5).std().item() == pytest.approx(std**2, rel=0.02)
    # Weights are log-normal: the mean of their squares is exp(std^4) / N^2, that of the uniform ones 1 / N^2.
    found = errors(cores_for("softmax", inputs), inputs, target("softmax"))
    assert found.uniform == pytest.approx(math.sqrt(-math.expm1(-(std**4))), rel=0.05)


def test_layers_count_alike() -> None:
    small, large = (random_inputs(1, 2, 32, 16, seed=seed).layers[0] for seed in (1, 2))
    large = (*large[:2], 100 * large[2])
    alone = [approximation.metrics("performer", Inputs([layer], ""))["output_error"] for layer in (small, large)]
    cores = cores_for("performer", Inputs([small], "")) * 2
    assert errors(cores, Inputs([small, large], ""), target("softmax")).output == pytest.approx(sum(alone) / 2)


def test_a_trained_model_is_read_where_its_cores_are(softmax_run: Run) -> None:
    """The second layer's q, k and v, projected by hand from what a hook on its block's norm sees."""
    model, info = softmax_run.model, softmax_run.info
    read: list[Tensor] = []
    hook = model.blocks[1].norm1.register_forward_hook(lambda _, args, out: read.append(out))
    with torch.no_grad():
        model(Normalise(info.mean, info.std, model.config.image_hw, torch.device("cpu"))(images()))
        hook.remove()
        projected = model.get_submodule("blocks.1.attention.qkv")(read[0])
    wanted = [x.unflatten(-1, (2, 16)).transpose(1, 2) for x in projected.chunk(3, dim=-1)]
    inputs = run_inputs(softmax_run, images())
    assert len(inputs.layers) == 2
    assert inputs.layers[1][0].shape == (3, 2, model.grid.num_tokens, 16)
    for found, right in zip(inputs.layers[1], wanted, strict=True):
        torch.testing.assert_close(found, right)
    assert not any(core._forward_pre_hooks for core in cores_for("softmax", inputs))
    assert info.id in inputs.source


@pytest.mark.parametrize(("height", "width"), [(16, 16), (4, 8)])
def test_other_resolutions(softmax_run: Run, linformer_run: Run, height: int, width: int) -> None:
    for run in (softmax_run, linformer_run):
        inputs = run_inputs(run, images(), TokenGrid(height, width))
        tokens = height * width + run.model.grid.num_prefix_tokens
        assert {x.shape for triple in inputs.layers for x in triple} == {(3, 2, tokens, 16)}
        for spec in ("performer", "nystromformer", "reformer", run.info.config["attention"]):
            metrics = approximation.metrics(spec, inputs)
            assert all(value >= 0 for name, value in metrics.items() if name.endswith("_error")), (spec, metrics)


def test_what_the_run_was_trained_with_is_measured_as_trained(linformer_run: Run) -> None:
    inputs = run_inputs(linformer_run, images())
    cores = cores_for("linformer:sharing=key-value,proj_dim=16", inputs)
    assert cores == [block.attention.core for block in linformer_run.model.blocks]
    own, new = (approximation.metrics(f"linformer:proj_dim={m}", inputs) for m in (16, 8))
    assert own["error_on"].endswith("parameters trained in 2 of 2 layers")
    assert new["error_on"].endswith("parameters untrained")
    assert "parameters" not in approximation.metrics("performer", inputs)["error_on"]
    larger = run_inputs(linformer_run, images(), TokenGrid(16, 16))
    assert cores_for("linformer:proj_dim=16", larger)[0].grid.num_tokens == 256


def test_layers_of_a_mixed_model_give_their_own_cores(results: str) -> None:
    inputs = run_inputs(trained(results, "softmax,1=linformer"), images())
    assert inputs.model is not None
    first, second = cores_for("linformer", inputs)
    assert second is inputs.model.blocks[1].attention.core
    assert first is not inputs.model.blocks[0].attention.core
    assert approximation.metrics("linformer", inputs)["error_on"].endswith("trained in 1 of 2 layers")


def test_shared_qk_runs_give_one_tensor_for_both(results: str) -> None:
    q, k, v = run_inputs(trained(results, "reformer"), images()).layers[0]
    assert torch.equal(q, k)
    assert not torch.equal(q, v)


@pytest.mark.parametrize(("spec", "why"), [("xca", "no core"), ("uniform", "do not read")])
def test_runs_without_queries_and_keys_are_refused(results: str, spec: str, why: str) -> None:
    with pytest.raises((UserError, AttentionError), match=why):
        run_inputs(trained(results, spec), images())


def test_what_approximates_nothing_has_no_error() -> None:
    inputs = random_inputs(1, 2, 16, 16)
    assert approximation.metrics("performer:kernel=relu", inputs) == {}
    with pytest.raises(AttentionError, match="softmax or shared-qk"):
        target("entmax")
    measured = {name for name in attention.available(own=True) if approximation.metrics(name, inputs)}
    assert measured == {"linformer", "nystromformer", "performer", "reformer"}


def test_maps_are_left_out_where_they_take_too_long() -> None:
    inputs = random_inputs(1, 2, 33, 16)
    assert approximation.metrics("performer", inputs, largest_map=32)["map_error"] is None
    assert approximation.metrics("performer", inputs, largest_map=33)["map_error"] > 0


@pytest.mark.skipif(PeakMemory(torch.device("cpu")).mib() is None, reason="this system does not tell peak memory")
def test_four_thousand_tokens_need_less_than_a_gibibyte() -> None:
    code = """if True:
        import torch
        from vitcmp.metrics import approximation
        from vitcmp.metrics.memory import PeakMemory
        approximation.metrics("performer", approximation.random_inputs(1, 4, 64, 64))
        inputs, peak = approximation.random_inputs(1, 4, 4096, 64), PeakMemory(torch.device("cpu"))
        approximation.metrics("performer", inputs)
        print(peak.mib())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 512
