"""The command line: parse, build a config, call one workflow, print.

Options come from the config classes: a field is an option, its docstring the help, its default the default.
Only the standard library, Typer, rich, the configs and the names of mechanisms are imported before a command runs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console

from vitcmp import __version__, attention
from vitcmp.configs import (
    AugmentConfig,
    BenchConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    UserError,
    help_texts,
    parse_integers,
    resolve_run,
    split,
)

app = typer.Typer(
    help="Compare attention mechanisms in Vision Transformers: train, evaluate, benchmark, look inside, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)


@dataclasses.dataclass
class Output:
    """How commands print: the global options."""

    json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """A line for a person, on stderr."""
        if not self.quiet:
            err.print(text, highlight=False, markup=False, soft_wrap=True)

    def data(self, value: Any) -> None:
        """The result for a program: one JSON document on stdout."""
        print(json.dumps(value, indent=2, default=list))


output = Output()
common: dict[str, Any] = {}


@app.callback()
def global_options(
    results: Annotated[
        str | None, typer.Option(envvar="VITCMP_RESULTS", help="Folder of the results store (default: results).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps (default: auto).")] = None,
    data_dir: Annotated[
        str | None, typer.Option(envvar="VITCMP_DATA", help="Folder of the data sets (default: ~/.cache/vitcmp).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Data as JSON on stdout, all else on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the versions and leave.", is_eager=True)] = False,
) -> None:
    """Global options come before the command's name."""
    if version:
        from vitcmp import machine

        versions = {**machine.versions(), "commit": machine.commit()}
        out.print(", ".join(f"{name} {value}" for name, value in versions.items() if value), highlight=False)
        raise typer.Exit
    output.json, output.quiet = as_json, quiet
    common.clear()
    common.update({k: v for k, v in (("results", results), ("device", device), ("data_dir", data_dir)) if v})


def options(*classes: type[Any], without: str = "", **changed: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option a field of each class; the command receives those that were given, as a dict.

    `without` names fields to leave out; `changed` replaces an option's declaration (an Annotated type).
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            own = {name: values.pop(name) for name in list(values) if name in arguments}
            command(**own, given={name: value for name, value in values.items() if value is not None})

        arguments = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in arguments]
        arguments = {p.name for p in arguments}  # type: ignore[assignment]
        for cls in classes:
            texts, hints = help_texts(cls), get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if field.name in without.split():
                    continue
                kind = changed.get(field.name) or _option(field, hints[field.name], texts.get(field.name, ""), cls)
                parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any, text: str, cls: type[Any]) -> Any:
    """An option for a field: choices are checked by the config, so that YAML and Python say the same."""
    members = [t for t in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint])]
    simple = [t for t in members if t in (int, float, bool) ]
    textual = any(t is str or get_origin(t) in (Literal, tuple) for t in members)
    kind: Any = str if textual or not simple else simple[0]
    flag = "--" + field.name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if default not in (None, dataclasses.MISSING, False):
        text += f" [dim](default: {default})[/dim]"
    choices = [c for t in members if get_origin(t) is Literal for c in get_args(t)]
    metavar = "|".join(map(str, choices)) if choices and len(members) == 1 else None
    panel = cls.__name__.removesuffix("Config")
    return Annotated[kind | None, typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)]


Mechanisms = Annotated[
    list[str] | None,
    typer.Option("--attention", help="Mechanism, as a spec such as performer:num_features=64; repeat it for several, "
                 "or all.", rich_help_panel="Model"),
]  # fmt: skip
Seeds = Annotated[
    str | None, typer.Option("--seeds", help="Seeds, such as 0-2 or 0,5 (default: 0).", rich_help_panel="Train")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of settings, named as the options (underscores for dashes).")
]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print the resolved settings and leave.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run and leave.")]
RUN_OPTIONS = (ModelConfig, DataConfig, AugmentConfig, TrainConfig)
# The global options stand before the command's name, and work after it too.
RUNTIME = (RuntimeConfig,)


@app.command(rich_help_panel="Work")
@options(*RUN_OPTIONS, RuntimeConfig, without="attention seed")
def train(
    given: dict[str, Any],
    attention_specs: Mechanisms = None,
    seeds: Seeds = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this unfinished run.")] = None,
    config: ConfigFile = None,
    show_config: ShowConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Train a model a mechanism and seed, test each once, and record it."""
    settings = settings_of(config, given, attention_specs, seeds)
    runtime = runtime_of(settings)
    if resume is not None:
        _resume(resume, runtime, settings)
        return
    specs, numbers = grid_of(settings)
    if "dataset" not in settings:
        output.say("no --dataset given: training on scikit-learn's digits (8 x 8 pixels, 64 patches)")
    runs = [resolve_run({**settings, "attention": spec, "seed": seed}) for spec in specs for seed in numbers]
    if show_config:
        output.data([run.flat() for run in runs])
        return
    if dry_run:
        for run in runs:
            out.print(f"train {run.model.attention} on {run.data.dataset}, seed {run.train.seed}", highlight=False)
        return
    from vitcmp.workflows.train import run as workflow

    with progress() as listen:
        records = [workflow(run, runtime, listen=listen) for run in runs]
    finish(records, runtime)


def _resume(name: str, runtime: RuntimeConfig, settings: Mapping[str, Any]) -> None:
    if settings:
        raise UserError(f"--resume takes the run's own settings; drop {', '.join(settings)}")
    from vitcmp import store
    from vitcmp.models.checkpoint import load_info
    from vitcmp.workflows.train import run as workflow

    folder = store.find_run(runtime.results, name)
    if any(record.id == folder.name for record in store.read(runtime.results)):
        raise UserError(f"run '{folder.name}' is finished; nothing to resume")
    with progress() as listen:
        record = workflow(load_info(folder).run_config, runtime, resume=folder, listen=listen)
    finish([record], runtime)


def settings_of(
    file: Path | None, given: Mapping[str, Any], specs: list[str] | None, seeds: str | None
) -> dict[str, Any]:
    """File, global options and command line in one flat mapping; the later wins."""
    settings = {**read_yaml(file), **common, **given}
    if specs:
        settings["attention"] = specs
    if seeds is not None:
        settings["seeds"] = seeds
    return settings


def read_yaml(path: Path | None) -> dict[str, Any]:
    """A YAML file of settings with the right types.

    Raises: UserError for a missing file, YAML that does not parse, unknown names and wrong types.
    """
    if path is None:
        return {}
    import yaml

    from vitcmp.configs import typed

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold settings, a line each, such as `epochs: 20`")
    settings: dict[str, Any] = {name.replace("-", "_"): value for name, value in content.items()}
    plain = {name: value for name, value in settings.items() if name not in ("attention", "seeds")}
    classes = (*RUN_OPTIONS, RuntimeConfig, BenchConfig)
    try:
        split(plain, *classes, strict=True)
        for name, kind in (("attention", str), ("seeds", int)):
            value = settings.get(name, [])
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, kind) and not isinstance(v, bool) or (name == "seeds" and isinstance(v, str)) for v in values):
                raise UserError(f"{name}: {value!r} must be {kind.__name__} or a list of them")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    del typed
    return settings


def runtime_of(settings: dict[str, Any]) -> RuntimeConfig:
    """Take the settings of RuntimeConfig out of `settings`."""
    names = {f.name for f in dataclasses.fields(RuntimeConfig)}
    (runtime,) = split({name: settings.pop(name) for name in list(settings) if name in names}, RuntimeConfig)
    return runtime


def grid_of(settings: dict[str, Any], default: tuple[str, ...] = (ModelConfig.attention,)) -> tuple[list[str], list[int]]:
    """Take mechanisms (canonical, each once) and seeds out of `settings`."""
    named = settings.pop("attention", None) or list(default)
    named = [named] if isinstance(named, str) else named
    specs = attention.available() if "all" in named else named
    seeds = settings.pop("seeds", settings.pop("seed", 0))
    seeds = seeds if isinstance(seeds, list) else parse_integers(str(seeds))
    return list(dict.fromkeys(attention.canonical(spec) for spec in specs)), list(seeds)
