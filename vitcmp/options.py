"""From config classes to command-line options, and from YAML files to settings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from vitcmp.configs import UserError, help_texts, split

Command = Callable[..., None]


def options(*classes: type[Any], without: str = "") -> Callable[[Command], Command]:
    """Give a command one option a field of each class, beside those of its own signature.

    The command receives those that were given in the dict `given`. `without` names fields to leave out.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        own_names = {p.name for p in own}
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        for cls in classes:
            texts, hints = help_texts(cls), get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if field.name not in (*own_names, *without.split()):
                    kind = _option(field, hints[field.name], texts[field.name], cls.__name__.removesuffix("Config"))
                    parameters.append(
                        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
                    )

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            mine = {name: values.pop(name) for name in own_names}
            command(given={name: value for name, value in values.items() if value is not None}, **mine)

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _option(field: dataclasses.Field[Any], hint: Any, text: str, panel: str) -> Any:
    """The declaration of one option. Choices are checked by the config, so that YAML and Python say the same."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    numbers = [t for t in members if t in (int, float, bool)]
    textual = any(t is str or get_origin(t) in (Literal, tuple) for t in members)
    kind: Any = str if textual or not numbers else numbers[0]
    flag = field.name.replace("_", "-")
    names = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    if default not in (None, False, ""):
        text += f" [dim]\\[default: {default}][/dim]"
    choices = [choice for t in members if get_origin(t) is Literal for choice in get_args(t)]
    shown = {int: "N", float: "X", str: "TEXT"}
    metavar = "|".join([*(shown[t] for t in members if t in shown and t is not bool), *choices]) or None
    return Annotated[kind | None, typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel)]


def read_yaml(
    path: Path | None, *classes: type[Any], sections: Mapping[str, type[Any]] | None = None
) -> dict[str, Any]:
    """The settings in a YAML file, checked against the fields of `classes`; no file, no settings.

    `sections` names mappings inside the file, each checked against a class of its own.

    Raises: UserError for a missing file, YAML that does not parse, unknown names and wrong types.
    """
    if path is None:
        return {}
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 wants a dot and a sign in 1.0e-3, and would read 1e-3 as text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        content = yaml.load(path.read_text(), Loader)
    except OSError as error:
        raise UserError(f"cannot read '{path}' ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold settings, a line each, such as `epochs: 20`")
    settings = {name.replace("-", "_"): value for name, value in content.items()}
    try:
        plain = dict(settings)
        for name, cls in (sections or {}).items():
            section = plain.pop(name, {})
            if not isinstance(section, dict):
                raise UserError(f"{name} must hold settings of its own, indented")
            split(section, cls, strict=True)
        split(plain, *classes, strict=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return settings


def take(settings: dict[str, Any], cls: type[Any]) -> Any:
    """An instance of `cls`, its fields taken out of `settings`."""
    names = {field.name for field in dataclasses.fields(cls)}
    (config,) = split({name: settings.pop(name) for name in list(settings) if name in names}, cls)
    return config


def only(settings: Mapping[str, Any], *classes: type[Any]) -> dict[str, Any]:
    """The settings that are fields of these classes."""
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    return {name: value for name, value in settings.items() if name in names}
