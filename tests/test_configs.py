"""Settings: precedence, ranges, types, names, and the way to a record and back."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest

from vitcmp import configs
from vitcmp.configs import (
    AugmentConfig,
    BenchConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    UserError,
    attention_name,
    by_layer,
    help_texts,
    parse_integers,
    resolve_run,
    split,
    typed,
    usable_cores,
)


def test_what_is_given_goes_before_recipe_preset_and_data_set() -> None:
    assert resolve_run({}).train.lr == 3e-3  # digits' own
    assert resolve_run({"lr": 1e-4}).train.lr == 1e-4
    assert resolve_run({"dataset": "mnist"}).model.preset == ModelConfig.preset
    assert resolve_run({}).model.preset == "tiny"
    assert resolve_run({"preset": "vit", "dataset": "mnist"}).model.dim == 128
    assert resolve_run({"preset": "vit", "dataset": "mnist", "dim": 64}).model.dim == 64
    assert resolve_run({"recipe": "strong"}).train.ema == 0.998
    assert resolve_run({"recipe": "strong", "ema": 0.5}).train.ema == 0.5
    assert resolve_run({"recipe": "strong"}).model.drop_path == 0.1
    # A preset's image size goes before the data set's.
    assert resolve_run({"dataset": "cifar10", "preset": "vit-tiny-16-224"}).model.image_size == 224


def test_the_data_set_fills_what_is_open() -> None:
    run = resolve_run({"dataset": "cifar100", "preset": "vit"})
    assert (run.model.image_size, run.model.channels, run.model.num_classes) == (32, 3, 100)
    assert run.augment.flip is True
    assert run.augment.crop_padding == 4
    mnist = resolve_run({"dataset": "mnist"})
    assert mnist.augment.flip is False
    assert mnist.augment.crop_padding == 3
    assert resolve_run({"dataset": "mnist", "flip": True, "crop_padding": 0}).augment == AugmentConfig(0, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "cifar"}, "unknown dataset 'cifar'; did you mean 'cifar10'"),
        ({"preset": "vit-48"}, "unknown preset 'vit-48'; did you mean 'vit-48x4'"),
        ({"recipe": "strng"}, "unknown recipe 'strng'; did you mean 'strong'"),
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
        ({"epoch": 1}, "unknown setting 'epoch'; did you mean 'epochs'"),
        ({"lr": 0}, r"lr \(0.*\) must be above 0"),
        ({"epochs": 0}, r"epochs \(0\) must be above 0"),
        ({"epochs": 1.5}, "epochs: 1.5 must be a valid integer"),
        ({"epochs": "many"}, "epochs: 'many' must be a valid integer"),
        ({"label_smoothing": 1}, r"label_smoothing \(1.*\) must be at least 0 and below 1"),
        ({"ema": -0.1}, "ema"),
        ({"random_erasing": 1.1}, "must be between 0 and 1"),
        ({"rand_magnitude": 31}, "must be at most 30"),
        ({"validation": 0}, r"validation \(0.*\) must be above 0"),
        ({"precision": "fp16"}, "precision: 'fp16' must be"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"micro_batch": "all"}, "micro_batch: 'all' must be"),
        ({"channels": 3}, r"channels \(3\) does not fit digits, which has 1"),
        ({"num_classes": 5}, r"num_classes \(5\) does not fit digits, which has 10"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": float("inf")}, "weight_decay"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve_run(settings)
    assert "\n" not in str(caught.value)


def test_noise_may_have_any_shape() -> None:
    run = resolve_run({"dataset": "fake", "num_classes": 7})
    assert run.model.num_classes == 7


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataset": "cifar10", "preset": "vitx", "recipe": "strong"},
        {"preset": "vit", "dataset": "mnist", "image_size": [28, 56], "train_samples": 10, "micro_batch": 4},
        {"attention": ["softmax", "linear"]},
    ],
)
def test_flat_settings_come_back(settings: dict[str, Any]) -> None:
    run = resolve_run(settings)
    assert RunConfig.from_flat(run.flat()) == run
    assert resolve_run(run.flat()) == run
    # As a record brings them: through JSON, tuples are lists.
    as_json = {k: list(v) if isinstance(v, tuple) else v for k, v in run.flat().items()}
    assert RunConfig.from_flat(as_json) == run


@pytest.mark.parametrize(
    ("text", "depth", "specs", "name"),
    [
        ("softmax", 3, "softmax", "softmax"),
        ("softmax,1=linear", 2, ("softmax", "linear"), "softmax,1=linear"),
        ("softmax,2-=linear", 4, ("softmax", "softmax", "linear", "linear"), "softmax,2-=linear"),
        ("softmax,0-1=linear", 3, ("linear", "linear", "softmax"), "linear,2=softmax"),
        ("softmax,0,2=linear", 4, ("linear", "softmax", "linear", "softmax"), "linear,1+3=softmax"),
        ("a,0-=b,1+3=c,3=d", 4, ("b", "c", "b", "d"), "b,1=c,3=d"),
        ("a:x=1,y=2,1=b:z=3,w=4", 2, ("a:x=1,y=2", "b:z=3,w=4"), "a:x=1,y=2,1=b:z=3,w=4"),
        ("softmax,0-=linear", 3, "linear", "linear"),
        (("linear", "linear"), 2, "linear", "linear"),
        (("a", "b", "b", "a", "b", "b"), 6, ("a", "b", "b", "a", "b", "b"), "a,1-2+4-=b"),
    ],
)
def test_a_mechanism_a_layer(text: Any, depth: int, specs: Any, name: str) -> None:
    model = ModelConfig(attention=text, depth=depth)
    assert model.attention == specs
    assert model.attention_name == attention_name(list(model.attention_specs)) == name
    assert by_layer(name, depth) == specs
    assert len(model.attention_specs) == depth


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("softmax,4=linear", r"'4' goes beyond the last layer, 3 \(they count from 0\)"),
        ("softmax,0-4=linear", "'0-4' goes beyond the last layer, 3"),
        ("softmax,4-=linear", "'4-' goes beyond the last layer, 3"),
        ("softmax,2-1=linear", "the range '2-1' is empty"),
        ("softmax,1--2=linear", "'1--2' names no layers; write 0, 6-11"),
        (("softmax", "linear"), "2 attention specs were given for 4 layers"),
    ],
)
def test_layers_that_are_not_there(attention: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(attention=attention, depth=4)


def test_threads_are_at_most_four_a_core_that_the_process_may_use() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_cores() == cores
    assert RuntimeConfig(threads=4 * cores).threads == 4 * cores
    with pytest.raises(
        UserError, match=rf"threads \({4 * cores + 1}\) must be at most {4 * cores}, four for each core"
    ):
        RuntimeConfig(threads=4 * cores + 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_cores_that_a_process_may_not_use_do_not_count() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vitcmp.configs import RuntimeConfig, UserError\n"
        "RuntimeConfig(threads=4)\n"
        "try: RuntimeConfig(threads=5)\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("threads (5) must be at most 4, four for each core that this process may use")


def test_no_two_configs_share_a_name() -> None:
    parts = (ModelConfig, DataConfig, AugmentConfig, TrainConfig, RuntimeConfig)
    names = [field.name for part in parts for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("cls", [ModelConfig, DataConfig, AugmentConfig, TrainConfig, RuntimeConfig, BenchConfig])
def test_every_setting_has_a_default_and_a_help_text(cls: type[Any]) -> None:
    texts = help_texts(cls)
    cls()
    for field in dataclasses.fields(cls):
        assert texts[field.name].endswith((".", ").")), field.name


@pytest.mark.parametrize("name", configs.PRESETS)
@pytest.mark.parametrize("dataset", configs.DATASETS)
def test_every_preset_fits_every_data_set_or_says_why(name: str, dataset: str) -> None:
    given = {"dataset": dataset, "preset": name}
    side = configs.PRESETS[name].get("image_size", configs.DATASETS[dataset]["image_size"])
    patch = configs.PRESETS[name].get("patch_size", 1)
    if side % patch:
        with pytest.raises(UserError, match="must be divisible by patch_size"):
            resolve_run(given)
    else:
        assert resolve_run(given).model.preset == name


def test_text_becomes_the_type_of_the_setting_unless_strict() -> None:
    assert typed({"epochs": "3", "lr": "1e-3"}, TrainConfig) == {"epochs": 3, "lr": 1e-3}
    assert typed({"lr": 1, "compile": True}, TrainConfig, strict=True) == {"lr": 1.0, "compile": True}
    with pytest.raises(UserError, match="epochs: '3' must be"):
        typed({"epochs": "3"}, TrainConfig, strict=True)
    with pytest.raises(UserError, match="compile: 1 must be"):
        typed({"compile": 1}, TrainConfig, strict=True)


def test_split_fills_several_configs() -> None:
    data, runtime = split({"dataset": "mnist", "threads": 2}, DataConfig, RuntimeConfig)
    assert data == DataConfig("mnist")
    assert runtime == RuntimeConfig(threads=2)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", (3,)),
        ("0,2,5", (0, 2, 5)),
        ("0-2", (0, 1, 2)),
        ("64..1024", (64, 128, 256, 512, 1024)),
        ("64..100", (64,)),
        ("1, 4-5, 8..16", (1, 4, 5, 8, 16)),
    ],
)
def test_integers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_integers(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "5-3", "8..4", "0..4", "1.5", "-", ".."])
def test_what_is_no_list_of_integers(text: str) -> None:
    with pytest.raises(UserError, match="is not a list of whole numbers"):
        parse_integers(text)
