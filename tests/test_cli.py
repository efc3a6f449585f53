"""The command line as a user meets it: real processes, exit codes, one line for a mistake."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from vitcmp import cli, store
from vitcmp.attention import AttentionError
from vitcmp.configs import UserError
from vitcmp.models.checkpoint import load_weights, save_weights

TINY = ["--train-samples", "128", "--epochs", "1"]


def vitcmp(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("VITCMP_RESULTS", "VITCMP_DATA")}
    return subprocess.run(
        [sys.executable, "-m", "vitcmp", *args], cwd=cwd, env={**env, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run in its results."""
    folder = tmp_path_factory.mktemp("user")
    done = vitcmp("train", "--attention", "performer", "--name", "first", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    return next((folder / "results" / "runs").iterdir()).name


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from vitcmp.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from vitcmp.cli import main

def tell(*_):
    print(" ".join(sys.modules), flush=True)
    os._exit(0)

register_optimizer_step_post_hook(tell)
sys.argv[1:] = ["--quiet", "train"]
main()
"""


def test_a_first_step_imports_nothing_heavy(tmp_path: Path):
    """What would delay training: torch's compiler alone takes a second."""
    done = subprocess.run([sys.executable, "-c", FIRST_STEP], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "vitcmp.workflows.train"} <= loaded
    heavy = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "torchvision", "entmax", "ptflops",
             "accelerate", "transformers", "timm", "tensorboard")  # fmt: skip
    assert not loaded & set(heavy)


def test_bare_train_says_what_it_trains_on_and_records_it(folder: Path, run: str):
    (record,) = store.read(folder / "results")
    assert (record.id, record.status, record.config["dataset"], record.config["name"]) == (run, "ok", "digits", "first")
    done = vitcmp("train", "--dry-run", cwd=folder)
    assert "digits" in done.stderr
    assert done.stdout == "train softmax on digits, seed 0\n"


BAD = {
    "mechanism": (["train", "--attention", "sofmax"], "did you mean 'softmax'"),
    "mechanism option": (["train", "--attention", "performer:features=3"], "num_features"),
    "option value": (["train", "--attention", "entmax:alpha=low"], "alpha=low must be a valid number"),
    "dataset": (["train", "--dataset", "cifar"], "did you mean 'cifar10'"),
    "preset": (["train", "--preset", "vitt"], "did you mean"),
    "recipe": (["train", "--recipe", "medium"], "available: plain, strong"),
    "flag": (["train", "--epoch", "3"], "--epochs"),
    "no number": (["train", "--epochs", "many"], "'--epochs'"),
    "zero epochs": (["train", "--epochs", "0"], "epochs (0) must be above 0"),
    "negative lr": (["train", "--lr", "-1"], "lr (-1.0) must be above 0"),
    "zero threads": (["train", "--threads", "0"], "threads (0) must be above 0"),
    **{
        f"too many threads: {command}": ([command, *rest, "--threads", "100000"], "threads (100000) must be at most")
        for command, *rest in (
            ["train"],
            ["eval", "run"],
            ["predict", "run", "picture.png"],
            ["bench"],
            ["compare", "--quick"],
            ["visualize", "run"],
            ["report"],
            ["runs"],
            ["doctor"],
        )
    },
    "seeds": (["train", "--seeds", "2-1"], "not a list of whole numbers"),
    "heads": (["train", "--num-heads", "5"], "divisible by num_heads (5)"),
    "patch": (["train", "--patch-size", "3"], "divisible by patch_size (3)"),
    "channels": (["train", "--channels", "3"], "does not fit digits"),
    "dropout": (["train", "--attention", "linear", "--attention-dropout", "0.1"], "set it to 0"),
    "device": (["train", "--device", "tpu"], "auto, cpu, cuda"),
    "config": (["train", "--config", "none.yaml"], "none.yaml"),
    "run": (["eval", "nosuchrun"], "no run 'nosuchrun'"),
    "run to resume": (["train", "--resume", "nosuchrun"], "no run 'nosuchrun'"),
    "run to draw": (["visualize", "nosuchrun"], "no run 'nosuchrun'"),
    "checkpoint": (["eval", "none.safetensors"], "no checkpoint"),
    "empty store": (["--results", "empty", "report"], "vitcmp train"),
    "tokens": (["bench", "--tokens", "64,none"], "not a list of whole numbers"),
    "no tokens": (["bench", "--tokens", "0"], "tokens (0) must be above 0"),
    "rounds": (["bench", "--rounds", "0"], "rounds (0) must be above 0"),
    "mode": (["bench", "--mode", "forward,bakward"], "unknown mode 'bakward'; did you mean 'backward'?"),
    "level": (["bench", "--level", "head"], "level: 'head' must be 'core', 'attention', 'block' or 'model'"),
    "image size": (["bench", "--image-size", "33"], "image_size (33) must be divisible by patch_size (4)"),
    "limit": (["bench", "--diff", ".", "--fail-on", "latency"], "is no limit; write a metric and by how much"),
    "limit without diff": (["bench", "--fail-on", "latency_ms:+1%"], "--fail-on needs records to compare with"),
    "diff": (["bench", "--diff", "none.json"], "'none.json' is neither a results folder nor a file"),
    "bench option": (["bench", "--attention", "nystromformer:num_landmarks=5000"], "num_landmarks"),
    "data folder": (["--data-dir", "nowhere", "train", "--dataset", "mnist"], "no data folder 'nowhere'"),
    "name": (["train", "--name", "../out"], "becomes a folder's name"),
    "second mechanism": (["train", "--attention", "softmax", "--attention", "entmax:alpha=0.5"], "alpha (0.5)"),
    "option given twice": (["train", "--attention", "entmax:alpha=1,alpha=2"], "given twice"),
    "auto or a number": (["train", "--micro-batch", "many"], "must be a valid integer or 'auto'"),
    "action": (["runs", "delete"], "list, show, rm"),
    "no such layer": (["train", "--attention-layers", "2-=linear"], "beyond the last layer, 1"),
    "empty range": (["train", "--attention-layers", "1-0=linear"], "the range '1-0' is empty"),
    "no layers": (
        ["train", "--attention-layers", "linear"],
        "must be layers, =, and a mechanism, such as 4-=performer",
    ),
    "no mechanism": (["train", "--attention-layers", "1="], "such as 4-=performer"),
    "layers' mechanism": (["train", "--attention-layers", "1=sofmax"], "did you mean 'softmax'"),
    "layers' option": (["compare", "--attention-layers", "1=performer:m=2"], "performer has no option 'm'"),
    "mixed attention": (
        ["bench", "--attention", "softmax", "--attention-layers", "0=linear"],
        "measure it with --level model",
    ),
    "mechanism to check": (["check", "sofmax"], "did you mean 'softmax'"),
    "file to check": (["check", "nowhere.py"], "no mechanism file 'nowhere.py'"),
    "mechanism to show": (["list", "sofmax"], "did you mean 'softmax'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_remedy(name: str, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITCMP_DATA", raising=False)
    monkeypatch.delenv("VITCMP_RESULTS", raising=False)
    args, remedy = BAD[name]
    monkeypatch.setattr(sys, "argv", ["vitcmp", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("vitcmp: ")]
    assert stopped.value.code == 2
    assert len(lines) == 1
    assert remedy in lines[0]
    assert "Traceback" not in printed.err
    assert not (tmp_path / "results").exists(), "nothing is written for bad input"


def run_here(*args: str) -> int:
    """The command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vitcmp", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_a_mixed_model_has_one_name_everywhere_and_its_record_all_layers(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.out, "width", 200)
    study = "attention: [softmax, linear]\nattention_layers: ['1=performer:num_features=16']\ntrain_samples: 64\n"
    (tmp_path / "study.yaml").write_text(study)
    mixed = ["softmax,1=performer:num_features=16", "linear,1=performer:num_features=16"]
    wanted = {f"train {name} on digits, seed 0" for name in mixed}
    for command in ("train", "compare"):
        assert run_here("--results", "results", command, "--config", "study.yaml", "--dry-run") == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.removesuffix(": to do") for line in lines if line.startswith("train")} == wanted
    one = ["--attention", mixed[0], "--attention", "softmax", "--attention-layers", "1=performer:num_features=16"]
    assert run_here("--results", "results", "train", *one, *TINY) == 0
    assert capsys.readouterr().out.startswith(f"{mixed[0]}, seed 0: test")
    (record,) = store.read(tmp_path / "results")
    assert record.config["attention"] == ["softmax", "performer:num_features=16"]
    assert record.id.startswith("digits-softmax-1-performer-num-features-16-s0-")
    for command in (["runs"], ["report"], ["eval", record.id]):
        assert run_here("--results", "results", *command) == 0
        assert mixed[0] in capsys.readouterr().out, command


def test_list_fits_a_terminal_and_shows_one_in_full(capsys, monkeypatch):
    monkeypatch.setattr(cli.out, "width", 80)
    assert run_here("list") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("performer"))
    assert line.split() == ["performer", "O(N", "m", "K)", "weights", "any", "softmax", "2009.14794"]
    assert run_here("list", "performer:num_features=16", "softmax") == 0
    shown = capsys.readouterr().out
    assert "https://arxiv.org/abs/2009.14794" in shown
    assert "num_features=auto" in shown
    assert "Random features, m" in shown
    assert run_here("--json", "list", "performer:num_features=16") == 0
    (value,) = json.loads(capsys.readouterr().out)
    assert value["options"]["num_features"]["value"] == 16
    assert (value["has_map"], value["no_map"], value["equivariant"], value["map_note"]) == (True, "", True, "")


def test_check_says_what_fails_and_exits_with_1(tmp_path: Path, capsys):
    lying = tmp_path / "lying.py"
    lying.write_text("from vitcmp.attention.linear import Config, build\ndef macs(layer, config):\n    return 7\n")
    assert run_here("--json", "check", str(lying), "linear") == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["holds"], second["holds"]) == (False, True)
    assert [f["check"] for f in first["findings"] if not f["holds"]] == ["macs"]
    assert run_here("check", str(lying)) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith("lying.py: 1 of 13 checks fail: macs")
    assert "Traceback" not in printed.err
    assert run_here("check", "linear") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "linear: all checks hold"


def test_offline_data_says_which_file_to_put_where(tmp_path: Path):
    (tmp_path / "data").mkdir()
    closed = "http://127.0.0.1:9"
    done = vitcmp("--data-dir", "data", "train", "--dataset", "cifar10", cwd=tmp_path, https_proxy=closed)
    assert done.returncode == 2
    assert "cifar-10-python.tar.gz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("epochs: many", "epochs: 'many' must be a valid integer"),
        ("epochs: '3'", "epochs: '3' must be a valid integer"),
        ("epoch: 3", "did you mean 'epochs'"),
        ("invert: 1", "invert: 1 must be a valid boolean"),
        ("- 3", "must hold settings"),
        ("a: [", "no valid YAML"),
        ("attention: 3", "attention: 3"),
    ],
)
def test_yaml_is_checked(text: str, remedy: str, tmp_path: Path):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises((UserError, AttentionError), match=r"study\.yaml") as caught:
        cli._settings({}, None, None, None, path)
    assert remedy in str(caught.value)


def test_command_line_beats_environment_beats_file(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("epochs: 7\nlr: 1e-3\nresults: of-file\nattention: linear\nseeds: [3, 4]\n")
    args = ["train", "--config", "run.yaml", "--lr", "0.5", "--show-config"]
    shown = vitcmp(*args, cwd=tmp_path, VITCMP_RESULTS="of-environment")
    assert shown.returncode == 0, shown.stderr
    first, second = yaml.safe_load_all(shown.stdout)
    assert (first["epochs"], first["lr"], first["attention"], first["seed"]) == (7, 0.5, "linear", 3)
    assert second["seed"] == 4
    settings = {}
    runner = CliRunner()
    real = cli._settings

    def spy(*given, **named):
        settings.update(real(*given, **named))
        return dict(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_settings", spy)
        patch.chdir(tmp_path)
        runner.invoke(cli.app, [*args[:3], "--dry-run"], env={"VITCMP_RESULTS": "of-environment"})
    assert settings["results"] == "of-environment"


def test_eval_as_json_is_json_and_keeps_predictions(folder: Path, run: str):
    done = vitcmp("--json", "eval", run[:10], "--corrupt", "noise", cwd=folder)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["kind"] == "eval"
    assert record["metrics"]["images"] == 360
    assert (folder / "results" / "runs" / run / "predictions-digits-test-8px-noise3.npz").is_file()


def test_bench_as_json_has_cells(folder: Path):
    args = ["--json", "bench", "--attention", "softmax", "--attention", "linear", "--tokens", "16,17"]
    args += ["--batch-size", "2", "--max-seconds", "0.1"]
    done = vitcmp(*args, cwd=folder)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [(c["attention"], c["tokens"], c["status"]) for c in cells] == [
        ("softmax", 16, "ok"), ("linear", 16, "ok"), ("softmax", 17, "ok"), ("linear", 17, "ok"),
    ]  # fmt: skip
    assert all(len(c["latency_samples_ms"]) >= 6 and min(c["latency_samples_ms"]) > 0 for c in cells)
    # Another bench against this one, and against one that was ten times quicker.
    (folder / "old.json").write_text(done.stdout)
    quicker = [{**c, **{name: [x / 10 for x in c[name]] if name.endswith("samples_ms") else c[name] / 10
                        for name in c if name.startswith("latency")}} for c in cells]  # fmt: skip
    (folder / "quicker.json").write_text(json.dumps({"cells": quicker}))
    limits = ["--fail-on", "latency_ms:+400%", "--fail-on", "peak_memory_mib:+400%"]
    few = ["16" if arg == "16,17" else arg for arg in args]
    assert vitcmp(*few[1:], "--diff", "old.json", *limits, cwd=folder).returncode == 0
    broken = vitcmp(*few, "--diff", "quicker.json", *limits, cwd=folder)
    assert broken.returncode == 3
    changes = json.loads(broken.stdout)["changes"]
    assert {c["metric"]: c["broken"] for c in changes} == {"latency_ms": "latency_ms:+400%", "peak_memory_mib": ""}
    # What is in the store already need not be measured again.
    again = vitcmp(*args[1:], "--resume", cwd=folder)
    assert again.returncode == 0
    assert again.stderr.startswith("4 cells are in results already\n")
    unknown = vitcmp(*args, "--diff", "old.json", "--fail-on", "latncy_ms:+10%", cwd=folder)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "unknown metric 'latncy_ms'; did you mean 'latency_ms'?" in unknown.stderr


def test_the_commands_that_look_up_work(folder: Path, run: str):
    assert run in json.loads(vitcmp("--json", "runs", "show", run, cwd=folder).stdout)["folder"]
    assert json.loads(vitcmp("--json", "runs", cwd=folder).stdout)[0]["run"] == run
    names = [m["name"] for m in json.loads(vitcmp("--json", "list", cwd=folder).stdout)]
    assert names == sorted(names)
    assert "softmax" in names
    assert "torch" in json.loads(vitcmp("--json", "doctor", cwd=folder).stdout)["versions"]
    assert "vitcmp 0." in vitcmp("--version", cwd=folder).stdout


def test_a_finished_run_is_not_resumed(folder: Path, run: str):
    done = vitcmp("train", "--resume", run, cwd=folder)
    assert done.returncode == 2
    assert "finished" in done.stderr


def test_report_prints_the_table_and_writes_it(folder: Path):
    done = vitcmp("report", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "performer" in done.stdout
    assert "performer" in (folder / "results" / "report" / "table.csv").read_text()


def test_a_diverged_run_exits_with_1(tmp_path: Path):
    done = vitcmp("train", *TINY, "--lr", "1e30", "--grad-clip", "0", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "diverged" in done.stdout
    assert store.read(tmp_path / "results")[0].status == "diverged"


def test_a_broken_model_is_told_in_a_line_and_exits_with_1(folder: Path, run: str, tmp_path: Path, capsys):
    model, info = load_weights(folder / "results" / "runs" / run / "model.safetensors")
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    broken, picture, results = tmp_path / "broken.safetensors", tmp_path / "picture.png", str(tmp_path / "results")
    save_weights(broken, model, info)
    Image.new("L", (8, 8)).save(picture)
    remedy = "train it again with a lower --lr or longer --warmup-epochs"
    assert run_here("--results", results, "eval", str(broken)) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "performer on digits (test, 360 images): diverged: the model's logits are not finite for 360 of 360 images; "
        + remedy
    )
    assert run_here("--results", results, "--json", "eval", str(broken)) == 1
    printed = capsys.readouterr().out
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", printed))
    record = json.loads(printed)
    assert (record["status"], record["metrics"]["nll"], record["metrics"]["class_top1_pct"]) == (
        "diverged", None, [0.0] * 10,
    )  # fmt: skip
    for options in ([], ["--json"]):
        assert run_here(*options, "predict", str(broken), str(picture)) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"vitcmp: the model's logits are not finite for 1 of 1 images; {remedy}\n"


def test_a_stopped_run_says_how_to_go_on_and_keeps_its_logging(tmp_path: Path):
    command = [sys.executable, "-m", "vitcmp", "--results", "results", "train", "--epochs", "30", "--save-every", "5"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("results/runs/*/state.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume RUN" in printed
    (folder,) = tmp_path.glob("results/runs/*")
    assert vitcmp("train", "--resume", folder.name, "--dry-run", cwd=tmp_path).returncode == 2
    done = vitcmp("train", "--resume", folder.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "epoch-0030.safetensors").is_file()
    assert [r.status for r in store.read(tmp_path / "results")] == ["interrupted", "ok"]


def test_a_results_folder_that_takes_no_records_is_refused_before_the_work(tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "records").write_text("in the way")
    done = vitcmp("train", *TINY, cwd=tmp_path)
    assert done.returncode == 2
    assert "choose another --results" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results" / "runs").exists()


def test_one_study_file_serves_train_bench_and_compare(tmp_path: Path):
    study = "attention: [linear]\nseeds: 0-1\nepochs: 1\nbench:\n  tokens: 16..64\n  rounds: 2\n"
    (tmp_path / "study.yaml").write_text(study)
    trained = vitcmp("train", "--config", "study.yaml", "--dry-run", cwd=tmp_path)
    assert trained.stdout.splitlines() == ["train linear on digits, seed 0", "train linear on digits, seed 1"]
    compared = vitcmp("compare", "study.yaml", "--dry-run", cwd=tmp_path)
    # Two trainings; the model as it was trained, and the mechanism at three sizes.
    assert [line.partition(" ")[0] for line in compared.stdout.splitlines()] == ["train"] * 2 + ["bench"] * 4
    (tmp_path / "none.yaml").write_text("attention: []\n")
    for command in ("train", "compare"):
        refused = vitcmp(command, "--config", "none.yaml", cwd=tmp_path)
        assert (refused.returncode, "at least one" in refused.stderr) == (2, True)
