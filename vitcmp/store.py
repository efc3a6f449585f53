"""The results store: append-only records, one JSON line each, and a pandas DataFrame of them.

    results/records/<writer>.jsonl     records; one writer file a machine, so that folders merge by copying
    results/runs/<id>/                 what a training run leaves: config, log, weights, predictions

A record is acknowledged once it is on the disk, and is never edited.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vitcmp.configs import UserError
from vitcmp.plain_json import to_json

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION: Literal[1] = 1


class StoreWarning(UserWarning):
    """A line of the store that could not be read."""


class Record(BaseModel):
    """One measured line. Metrics carry their unit in their names."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    """Unique: for a training run, its folder's name."""
    kind: Literal["train", "eval", "bench"]
    status: Literal["ok", "failed", "oom", "timeout", "diverged", "interrupted"]
    time: str
    """When it was written, UTC, ISO 8601."""
    key: str
    """Hash of what defines the cell: configuration, code and data."""
    config: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, Any]
    commit: str | None = None
    metrics: dict[str, Any] = {}
    warnings: list[str] = []
    error: str | None = None
    """Why the status is not ok."""


def new_record(**fields: Any) -> Record:
    """A record with the time and, unless given, an id of its own."""
    fields.setdefault("id", uuid.uuid4().hex[:12])
    return Record(time=datetime.now(UTC).isoformat(timespec="seconds"), **fields)


def check_writable(results: str | Path) -> None:
    """Raise UserError where records cannot be written: asked before any work starts, so that none is lost."""
    try:
        (Path(results) / "records").mkdir(parents=True, exist_ok=True)
        os.close(os.open(Path(results) / "records" / f"{_writer()}.jsonl", os.O_WRONLY | os.O_CREAT, 0o644))
    except OSError as error:
        raise UserError(f"cannot write to '{results}' ({error.strerror}); choose another --results") from None


def append(results: str | Path, record: Record) -> None:
    """Write one record: when this returns, it is on the disk.

    Raises: UserError where the disk does not take it; nothing of it is left then.
    """
    try:
        _append(Path(results) / "records", record)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write a record to '{results}' ({reason}); free some space and run it again") from None


def _append(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    line = (to_json(record.model_dump()) + "\n").encode()
    descriptor = os.open(folder / f"{_writer()}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        # A writer that was killed may have left a torn line: end it, so that ours stands alone.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            os.ftruncate(descriptor, size)
            raise OSError(f"the disk took {written} of {len(line)} bytes of a record in {folder}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(results: str | Path) -> list[Record]:
    """All records under `results`, oldest first.

    A torn line, as a killed writer leaves it, is skipped with a StoreWarning; so is a line of another schema, with
    its file and number. Records that stand twice, as after merging folders, count once.
    """
    records: dict[str, Record] = {}
    for path in sorted((Path(results) / "records").glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = Record.model_validate_json(line)
            except ValidationError as error:
                torn = number == len(lines) or error.errors()[0]["type"] == "json_invalid"
                what = "a torn line" if torn else f"no record of this version ({error.errors()[0]['msg']})"
                warnings.warn(f"{path.name}, line {number}: {what}; skipped", StoreWarning, 2)
                continue
            records[record.id] = record
    return sorted(records.values(), key=lambda r: r.time)


def load(results: str | Path = "results") -> pd.DataFrame:
    """All records under `results` as a table."""
    return table(read(results))


def table(records: Sequence[Record]) -> pd.DataFrame:
    """Records as a table: config and metrics under their own names, hardware and versions with a prefix."""
    import pandas as pd  # here, since training has no need of it

    rows = []
    for record in records:
        fields = record.model_dump()
        row = {**fields.pop("config"), **fields.pop("metrics")}
        for part in ("hardware", "versions"):
            row |= {f"{part}_{name}": value for name, value in fields.pop(part).items()}
        rows.append({**row, **fields})
    return pd.DataFrame(rows)


load_records = load


def cell_key(kind: Literal["train", "eval", "bench"], config: Mapping[str, Any], *others: Any) -> str:
    """16 hex digits of a configuration, the code that computes, and whatever else defines a cell."""
    text = json.dumps([kind, config, _code_digest(kind), others], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code_digest(kind: str) -> str:
    """Of every source file that can change a number: rendering and the command line cannot."""
    root = Path(__file__).parent
    files = [root / "configs.py", root / "workflows" / f"{kind}.py"]
    files += [file for part in ("attention", "models", "data", "metrics") for file in (root / part).rglob("*.py")]
    files = [file for file in files if file.name not in ("pictures.py", "interpret.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _writer() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write(temporary)` write a file, bring it to the disk, and give it its name: whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, written whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(to_json(value, indent=2) + "\n"))


def read_log(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run's log, one a number: after a resume, the later line counts."""
    epochs: dict[int, dict[str, Any]] = {}
    for line in _log_lines(run):
        if "validation_top1_pct" in line:
            epochs[line["epoch"]] = line
    return [epochs[number] for number in sorted(epochs)]


def _log_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            warnings.warn(f"{run.name}/log.jsonl has a torn line; skipped", StoreWarning, 2)
    return lines


def append_log(run: Path, line: Mapping[str, Any]) -> None:
    """One line of a run's log, on its own line even where a killed writer left a torn one."""
    text = to_json(line) + "\n"
    with (run / "log.jsonl").open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write((("\n" if torn else "") + text).encode())


def find_run(results: str | Path, name: str) -> Path:
    """The folder of a run, by path, by id, or by the beginning of one id only.

    Raises: UserError where there is none, or several.
    """
    if Path(name).is_dir() and (Path(name) / "config.json").is_file():
        return Path(name)
    folders = sorted((Path(results) / "runs").glob("*/config.json"))
    runs = [folder.parent for folder in folders]
    for candidates in ([r for r in runs if r.name == name], [r for r in runs if r.name.startswith(name)]):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise UserError(f"'{name}' could be {', '.join(r.name for r in candidates)}; give more of the name")
    raise UserError(f"no run '{name}' in {Path(results) / 'runs'}; `vitcmp runs` lists them")
