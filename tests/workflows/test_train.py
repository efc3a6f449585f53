"""Training: repeatable, resumable to the bit, honest about what went wrong."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitcmp import machine, store
from vitcmp.configs import RuntimeConfig, TrainConfig, UserError, resolve_run
from vitcmp.data.augment import Batch
from vitcmp.data.datasets import load_data
from vitcmp.metrics import memory
from vitcmp.models.checkpoint import load_run
from vitcmp.models.vit import build_model
from vitcmp.workflows import train
from vitcmp.workflows.train import Schedule, make_optimizer, mixed_cross_entropy, run, train_step

SMALL: dict[str, Any] = {
    "train_samples": 128, "batch_size": 32, "epochs": 2, "dim": 16, "mlp_dim": 32, "num_heads": 2
}  # fmt: skip
LEARNING: dict[str, Any] = {"train_samples": 640, "epochs": 3, "lr": 1e-2}
TIMES = {"seconds", "train_seconds", "throughput_img_s", "seconds_per_epoch", "peak_memory_mib"}


def run_small(
    results: Path, resume: Path | None = None, listen: Any = lambda event: None, **settings: Any
) -> store.Record:
    runtime = {k: settings.pop(k) for k in ("save_every", "log_every", "name") if k in settings}
    config = resolve_run({**SMALL, **settings})
    return run(config, RuntimeConfig(results=str(results), device="cpu", threads=2, **runtime), resume, listen)


def only_run(results: Path) -> Path:
    (folder,) = (results / "runs").iterdir()
    return folder


def stop_after_first_epoch(event: dict[str, Any]) -> None:
    if event["event"] == "epoch":
        raise KeyboardInterrupt


def assert_same_run(first: Path, second: Path) -> None:
    """Two run folders: logs equal but for times, weights and predictions equal to the bit."""
    logs = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in store.read_log(folder)]
        for folder in (first, second)
    ]
    assert logs[0] == logs[1]
    assert logs[0]
    for file in ("model.safetensors", "last.safetensors"):
        one, two = load_file(first / file), load_file(second / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), file
    with np.load(first / "predictions.npz") as one, np.load(second / "predictions.npz") as two:
        assert np.array_equal(one["logits"], two["logits"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[store.Record, Path]:
    results = tmp_path_factory.mktemp("finished")
    events: list[dict[str, Any]] = []
    record = run_small(results, listen=events.append, save_every=1, log_every=10, name="first", **LEARNING)
    assert [e["event"] for e in events].count("epoch") == 3
    assert events[0]["event"] == "start"
    return record, only_run(results)


def test_the_record_tells_the_run(finished: tuple[store.Record, Path]) -> None:
    record, folder = finished
    assert record.status == "ok"
    assert record.id == folder.name
    m = record.metrics
    for name in ("train_top1_pct", "validation_top1_pct", "top1_pct"):
        assert 20 < m[name] <= 100  # it has learnt: chance is 10 %
    assert m["top1_low_pct"] < m["top1_pct"] < m["top1_high_pct"]
    assert m["params_m"] == pytest.approx(sum(p.numel() for p in load_run(str(folder)).model.parameters()) / 1e6)
    assert m["epochs_run"] == 3
    assert m["tokens"] == 64
    assert m["seconds_per_epoch"] > 0
    assert m["throughput_img_s"] > 0
    assert record.config["name"] == "first"
    assert record.config["attention"] == "softmax"
    assert record.config["seed"] == 0
    assert record.versions["torch"] == torch.__version__.split("+")[0] or torch.__version__ in record.versions["torch"]
    # What the validation log says of the best epoch is what the record says.
    best = store.read_log(folder)[m["best_epoch"] - 1]
    assert m["validation_top1_pct"] == pytest.approx(best["validation_top1_pct"])


def test_the_record_is_in_the_store(finished: tuple[store.Record, Path]) -> None:
    record, folder = finished
    assert store.read(folder.parent.parent) == [record]
    text = next((folder.parent.parent / "records").glob("*.jsonl")).read_text()
    assert str(folder.parent) not in text  # no absolute path


def test_the_folder_holds_what_it_should(finished: tuple[store.Record, Path]) -> None:
    _, folder = finished
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "log.jsonl", "model.safetensors", "last.safetensors", "state.pt", "predictions.npz",
        "kernel_profile.json",
        "epoch-0001.safetensors", "epoch-0002.safetensors", "epoch-0003.safetensors",
    }  # fmt: skip
    last, third = load_file(folder / "last.safetensors"), load_file(folder / "epoch-0003.safetensors")
    assert all(torch.equal(last[name], third[name]) for name in last)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert [(line["epoch"], line["step"]) for line in steps] == [(e, s) for e in (1, 2, 3) for s in (0, 10)]
    schedule = Schedule(resolve_run({**SMALL, **LEARNING}).train, steps_an_epoch=20)
    for line in steps:
        assert line["lr"] == pytest.approx(schedule.lr(20 * (line["epoch"] - 1) + line["step"]))


def test_the_predictions_are_those_of_the_model(finished: tuple[store.Record, Path]) -> None:
    record, folder = finished
    data = load_data("digits")
    with np.load(folder / "predictions.npz") as kept:
        assert np.array_equal(kept["labels"], data.test.labels.numpy())
        assert (kept["predicted"] == kept["labels"]).mean() * 100 == pytest.approx(record.metrics["top1_pct"])
        loaded = load_run(str(folder))
        mean, std = torch.tensor(loaded.info.mean), torch.tensor(loaded.info.std)
        images = (data.test.images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        with torch.no_grad():
            logits = loaded.model(images)
        torch.testing.assert_close(torch.from_numpy(kept["logits"]), logits, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for part in "ab":
        run_small(tmp_path / part, recipe="strong")
    assert_same_run(only_run(tmp_path / "a"), only_run(tmp_path / "b"))


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    records = [run_small(tmp_path, seed=seed, epochs=1) for seed in (0, 1)]
    assert records[0].key != records[1].key
    first, second = (load_file(tmp_path / "runs" / r.id / "last.safetensors") for r in records)
    assert not torch.equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema": 0.9, "dropout": 0.1, "attention_dropout": 0.1, "mixup": 0.4, "drop_path": 0.2},
        {"attention": "performer:num_features=8,redraw_interval=3", "recipe": "strong"},
    ],
    ids=["plain", "ema, dropout, mixup", "performer, strong"],
)
def test_resumed_is_as_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = run_small(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path / "cut", listen=stop_after_first_epoch, **settings)
    torch.rand(7)  # whatever else drew from the global stream
    folder = only_run(tmp_path / "cut")
    resumed = run_small(tmp_path / "cut", resume=folder, **settings)
    assert_same_run(only_run(tmp_path / "whole"), folder)
    assert {k: v for k, v in whole.metrics.items() if k not in TIMES} == {
        k: v for k, v in resumed.metrics.items() if k not in TIMES
    }
    assert resumed.key == whole.key
    assert resumed.id == folder.name
    assert [r.status for r in store.read(tmp_path / "cut")] == ["interrupted", "ok"]


def test_a_finished_run_resumed_trains_no_more(finished: tuple[store.Record, Path], tmp_path: Path) -> None:
    record, folder = finished
    before = (folder / "last.safetensors").read_bytes()
    again = run_small(folder.parent.parent, resume=folder, name="first", **LEARNING)
    assert (folder / "last.safetensors").read_bytes() == before
    assert again.metrics["top1_pct"] == record.metrics["top1_pct"]
    assert len(store.read(folder.parent.parent)) == 1  # the same run, once


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_damaged_state_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path, listen=stop_after_first_epoch)
    folder = only_run(tmp_path)
    whole = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=r"state\.pt is damaged"):
        run_small(tmp_path, resume=folder)


def make_batch(size: int, dtype: torch.dtype = torch.float64) -> Batch:
    torch.manual_seed(1)
    labels, others = torch.randint(0, 10, (2, size))
    return Batch(torch.randn(size, 1, 8, 8, dtype=dtype), labels, others, torch.rand(size, dtype=dtype))


def gradients(size: int, num_lanes: int = 1, **settings: Any) -> tuple[dict[str, Tensor], float, float]:
    model = build_model("tiny", image_size=8, channels=1, attention="softmax").double().train()
    config = TrainConfig(**settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, correct = train_step(model, make_batch(20), optimizer, config, size, "fp32", num_lanes)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss.item(), correct.item()


@pytest.mark.parametrize(("size", "num_lanes"), [(1, 1), (3, 1), (8, 1), (20, 1), (64, 1), (3, 2), (20, 2), (64, 3)])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(size: int, num_lanes: int, clip: float) -> None:
    whole, loss, correct = gradients(20, grad_clip=clip)
    parts, parts_loss, parts_correct = gradients(size, num_lanes, grad_clip=clip)
    again, *_ = gradients(size, num_lanes, grad_clip=clip)
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert parts.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-12)
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    assert parts_correct == correct
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole.values()))
    assert norm == pytest.approx(0.01, rel=1e-3) if clip else norm > 0.01


def test_the_loss_is_the_mean_over_the_batch() -> None:
    model = build_model("tiny", image_size=8, channels=1).double().train()
    batch = make_batch(20)
    wanted = mixed_cross_entropy(model(batch.images), batch.labels, batch.other_labels, batch.share, 0.1).mean()
    loss, _ = train_step(model, batch, torch.optim.SGD(model.parameters(), lr=0.0), TrainConfig(), 8, "fp32")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_mixed_cross_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))
    zero, one = torch.tensor([0]), torch.tensor([1])
    plain = mixed_cross_entropy(logits, zero, zero, torch.ones(1), 0.0)
    assert plain.item() == pytest.approx(-math.log(0.5))
    mixed = mixed_cross_entropy(logits, zero, one, torch.tensor([0.75]), 0.0)
    assert mixed.item() == pytest.approx(-0.75 * math.log(0.5) - 0.25 * math.log(0.3))
    smooth = mixed_cross_entropy(logits, zero, zero, torch.ones(1), 0.3)
    assert smooth.item() == pytest.approx(-0.7 * math.log(0.5) - 0.1 * math.log(0.5 * 0.3 * 0.2))


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    record = run_small(tmp_path, lr=1e30, warmup_epochs=0, grad_clip=0)
    assert record.status == "diverged"
    assert "lower --lr" in str(record.error) or "index" in str(record.error)
    assert "top1_pct" not in record.metrics
    assert [r.status for r in store.read(tmp_path)] == ["diverged"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_run_that_breaks_in_its_last_step_has_diverged_too(tmp_path: Path) -> None:
    """The loss of the only step is finite; the weights after it are not."""
    record = run_small(tmp_path, lr=1e38, epochs=1, batch_size=128, warmup_epochs=0, grad_clip=0)
    assert record.status == "diverged"
    assert "top1_pct" not in record.metrics


BREAKS_ON_TEST = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass(frozen=True)
class Config:
    pass

class Mixer(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (torch.nan if len(x) == 360 else 1)  # as many as digits has test images

def build(layer, config):
    return Mixer(layer.dim, layer.dim)

def macs(layer, config):
    return 0
"""


def test_a_run_that_breaks_on_the_test_images_alone_has_diverged_too(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS_ON_TEST)
    record = run_small(tmp_path, attention=str(tmp_path / "breaks.py"))
    assert record.status == "diverged"
    assert "not finite for 360 of 360 images; train it again with a lower --lr" in str(record.error)
    assert (record.metrics["top1_pct"], record.metrics["epochs_run"]) == (0, 2)
    assert record.metrics["validation_top1_pct"] > 0
    with np.load(only_run(tmp_path) / "predictions.npz") as kept:
        assert set(kept["predicted"]) == {-1}


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path, listen=stop_after_first_epoch)
    (record,) = store.read(tmp_path)
    assert record.status == "interrupted"
    assert record.id.startswith(only_run(tmp_path).name)
    assert record.metrics["params_m"] > 0


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    def fail(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            raise RuntimeError("the cat sat on it")

    record = run_small(tmp_path, listen=fail)
    assert (record.status, record.error) == ("failed", "RuntimeError: the cat sat on it")
    assert "Traceback" in (only_run(tmp_path) / "error.txt").read_text()


def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    def fail(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            torch.empty(2**50)

    assert run_small(tmp_path, listen=fail).status == "oom"


def test_mistakes_are_errors_before_anything_is_written(tmp_path: Path) -> None:
    for settings in ({"attention": "sofmax"}, {"attention": "entmax:alpha=0"}, {"train_samples": 10**6}):
        with pytest.raises(ValueError, match=r"sofmax|alpha|train_samples"):
            run_small(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --results"):
        run_small(tmp_path / "file")


def test_only_matrices_decay() -> None:
    model = build_model("vitx", depth=1, qkv_bias=True, out_bias=True)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.3), torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert decay[id(parameter)] == (0.3 if is_matrix else 0.0), name


def test_our_adamw_is_torchs() -> None:
    """To the bit over some steps, and either reads the other's state."""
    models = [build_model("tiny", image_size=8, channels=1) for _ in range(2)]
    config = TrainConfig(weight_decay=0.3)
    ours = make_optimizer(models[0], config, torch.device("cpu"))
    groups = [{**g, "params": [p.detach().clone().requires_grad_() for p in g["params"]]} for g in ours.param_groups]
    theirs = torch.optim.AdamW(groups)
    for _ in range(3):
        for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            for p, q in zip(mine["params"], other["params"], strict=True):
                p.grad = torch.randn(p.shape)
                q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(mine["params"], other["params"], strict=True))
    again = make_optimizer(models[1], config, torch.device("cpu"))
    again.load_state_dict(theirs.state_dict())
    first, second = (torch.nn.utils.parameters_to_vector(
        [state["exp_avg_sq"] for state in optimizer.state.values()]) for optimizer in (ours, again))  # fmt: skip
    assert torch.equal(first, second)
    assert first.norm() > 0


@pytest.mark.parametrize(
    ("device", "precision", "in_parts", "kept"),
    [
        ("cpu", "fp32", False, True),
        ("cpu", "fp32", True, False),
        ("cpu", "bf16", True, True),
        ("mps", "bf16", True, False),
    ],
)
def test_freed_memory_is_kept_where_it_pays(device: str, precision: str, in_parts: bool, kept: bool) -> None:
    assert train.keeps_memory(torch.device(device), precision, in_parts) is kept


@pytest.mark.parametrize(
    ("threads", "in_parts", "settings", "wanted"),
    [
        (2, True, {}, 2),
        (2, False, {}, 1),
        (1, True, {}, 1),
        (16, True, {}, 1),
        (2, True, {"dropout": 0.1}, 1),
        (2, True, {"compile": True}, 1),
    ],
)
def test_lanes_are_used_where_they_pay(
    monkeypatch: pytest.MonkeyPatch, threads: int, in_parts: bool, settings: dict[str, Any], wanted: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config = resolve_run({"dataset": "fake", **settings})
    assert train.lanes(config, torch.device("cpu"), in_parts) == wanted
    assert train.lanes(config, torch.device("mps"), in_parts) == 1


def test_the_schedule_has_its_values() -> None:
    schedule = Schedule(TrainConfig(epochs=5, lr=1.0, min_lr=0.1, warmup_epochs=2), steps_an_epoch=10)
    assert schedule.lr(0) == pytest.approx(1 / 20)
    assert schedule.lr(9) == pytest.approx(0.5)
    assert schedule.lr(19) == schedule.lr(20) == pytest.approx(1.0)
    assert schedule.lr(35) == pytest.approx((1 + 0.1) / 2)
    assert schedule.lr(50) == pytest.approx(0.1)
    assert schedule.lr(49) == pytest.approx(0.1, abs=3e-3)
    falling = [schedule.lr(step) for step in range(20, 51)]
    assert falling == sorted(falling, reverse=True)
    assert Schedule(TrainConfig(epochs=1, lr=1.0, warmup_epochs=0), 4).lr(0) == 1.0
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, TrainConfig(), torch.device("cpu"))
    schedule.set_lr(optimizer, 9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5])


def test_training_stops_early(tmp_path: Path) -> None:
    record = run_small(tmp_path, epochs=6, early_stopping=2, lr=1e-12, min_lr=0.0)
    assert record.metrics["best_epoch"] == 1
    assert record.metrics["epochs_run"] == 3


def test_the_average_of_the_weights_is_what_is_kept(tmp_path: Path) -> None:
    """With a decay of nearly 1 the average stays where the weights began (but for the first, which it copies)."""
    record = run_small(tmp_path, ema=0.999999, epochs=1, lr=1e-2, min_lr=1e-2, warmup_epochs=0)
    kept = load_file(tmp_path / "runs" / record.id / "last.safetensors")["head.weight"]
    state = torch.load(tmp_path / "runs" / record.id / "state.pt", weights_only=True)
    trained = state["model"]["head.weight"]
    start = build_model("tiny", image_size=8, channels=1, dim=16, mlp_dim=32, num_heads=2).head.weight.detach()
    assert (kept - start).norm() < 0.7 * (trained - start).norm()


def test_a_pointless_configuration_is_noted_in_the_record(tmp_path: Path) -> None:
    record = run_small(tmp_path, attention="performer:num_features=100", epochs=1)
    assert record.warnings == ["performer: 100 features for 64 tokens cost more than full attention"]


def test_equal_specs_have_equal_keys() -> None:
    data = load_data("digits")
    one, two, other = (
        train.run_key(train.canonical(resolve_run({"attention": spec})), data)
        for spec in ("entmax:alpha=1.5", "entmax", "entmax:alpha=2")
    )
    assert one == two != other


def test_training_from_python(tmp_path: Path) -> None:
    record = train.train(results=str(tmp_path), device="cpu", **{**SMALL, "epochs": 1})
    assert store.load(tmp_path)["top1_pct"].tolist() == [record.metrics["top1_pct"]]


def peaks(specs: tuple[str, ...], threads: int, results: Path) -> dict[str, float | None]:
    """Peak memory of one run after the other in this process."""
    settings = {"train_samples": 64, "epochs": 1, "batch_size": 64}
    if threads > 1:  # two parts of a batch beside each other
        settings["micro_batch"] = 16
    runtime = RuntimeConfig(results=str(results), device="cpu", threads=threads)
    records = [run(resolve_run({**settings, "attention": spec}), runtime) for spec in specs]
    assert [(record.status, record.warnings) for record in records] == [("ok", [])] * len(specs)
    return {spec: record.metrics["peak_memory_mib"] for spec, record in zip(specs, records, strict=True)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peak memory")
@pytest.mark.parametrize(
    ("threads", "processes"),
    [
        (1, [("softmax", "linear", "performer"), ("performer", "linear", "softmax"), ("linear",)]),
        (2, [("performer", "softmax"), ("softmax",)]),
    ],
)
def test_peak_memory_is_the_mechanisms_own_whatever_ran_before(
    threads: int, processes: list[tuple[str, ...]], tmp_path: Path
) -> None:
    context = machine.process_context(torch.device("cpu"), preload="vitcmp.workflows.train")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        found = [fresh.submit(peaks, specs, threads, tmp_path).result() for specs in processes]
    # What runs first in a process runs as if it were alone.
    alone = {specs[0]: readings[specs[0]] for specs, readings in zip(processes, found, strict=True)}
    for readings in found:
        assert readings == {spec: pytest.approx(alone[spec], rel=0.1) for spec in readings}
    assert all(3 < mib < 30 for mib in alone.values())


def test_memory_that_cannot_be_told_is_none_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = resolve_run(SMALL), load_data("digits")
    compiled = train._step_memory(config, data, torch.device("cpu"), 32, "fp32", 1, compiled=True)
    assert compiled == (
        None,
        "unknown for a compiled model; measure it with `vitcmp bench --level model --mode train-step`",
    )
    monkeypatch.setattr(memory, "_status_mib", unreadable)
    record = run_small(tmp_path, epochs=1)
    assert (record.status, record.metrics["peak_memory_mib"]) == ("ok", None)
    assert record.warnings == ["peak memory: this system does not tell"]


def unreadable(field: str) -> float:
    raise OSError(field)


def test_too_many_threads_are_refused_before_torch_starts_them(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=r"threads \(100000\) must be at most"):
        train.train(results=str(tmp_path), threads=100_000, **SMALL)
    assert torch.get_num_threads() == before
    assert list(tmp_path.iterdir()) == []


KILLED = """
import json, sys
from vitcmp.configs import RuntimeConfig, resolve_run
from vitcmp.workflows.train import run
run(resolve_run(json.loads(sys.argv[2])), RuntimeConfig(results=sys.argv[1], device="cpu", threads=2))
"""


def test_a_killed_run_can_be_resumed(tmp_path: Path) -> None:
    settings = {**SMALL, "epochs": 4}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed"), json.dumps(settings)])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("runs/*/state.pt")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    folder = only_run(tmp_path / "killed")
    assert not (folder / "predictions.npz").exists()
    assert store.read(tmp_path / "killed") == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", store.StoreWarning)  # a torn line of the log is possible
        resumed = run_small(tmp_path / "killed", resume=folder, **settings)
        assert resumed.status == "ok"
        assert store.read(tmp_path / "killed") == [resumed]
        whole = run_small(tmp_path / "whole", **settings)
        assert_same_run(only_run(tmp_path / "whole"), folder)
    assert resumed.metrics["top1_pct"] == whole.metrics["top1_pct"]


def test_a_step_of_bf16_stays_near_fp32() -> None:
    model, batch = build_model("tiny", image_size=8, channels=1).train(), make_batch(20, torch.float32)
    losses = {}
    for precision in ("fp32", "bf16"):
        other = copy.deepcopy(model)
        loss, _ = train_step(other, batch, torch.optim.SGD(other.parameters(), lr=0.0), TrainConfig(), 8, precision)
        losses[precision] = loss.item()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in other.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
