"""What the commands print: results on stdout, all else on stderr; tables, and progress on a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vitcmp.configs import attention_name
from vitcmp.plain_json import to_json

if TYPE_CHECKING:
    from rich.table import Table

out = Console()
err = Console(stderr=True)


@dataclasses.dataclass
class Output:
    """How commands print: set by the global options."""

    json: bool = False
    quiet: bool = False

    def say(self, text: str) -> None:
        """A line for a person, on stderr."""
        if not self.quiet:
            err.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, value: Any, text: str | Table | Callable[[], object]) -> None:
        """The result on stdout: `value` as JSON where that was asked for, else `text` for a person."""
        if self.json:
            print(to_json(value, indent=2))
        elif callable(text):
            text()
        elif isinstance(text, str):
            out.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            out.print(text)


output = Output()


@contextmanager
def training_progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """What listens to one training run: a bar on a terminal, a line an epoch elsewhere."""
    with _live() as bar:
        task = bar.add_task("", total=1.0, facts="")

        def listen(event: dict[str, Any]) -> None:
            kind = event["event"]
            if kind == "start":
                for note in event["notes"]:
                    output.say(f"note: {note}")
                output.say(f"run {event['run']}")
            elif kind == "note":
                output.say(event["text"])
            elif kind == "step":
                done = (event["epoch"] + event["done"]) / event["epochs"]
                bar.update(task, completed=done, description=f"epoch {event['epoch'] + 1}/{event['epochs']}",
                           facts=_step_facts(event))  # fmt: skip
            elif kind == "epoch" and not bar.live.is_started:
                output.say(_epoch_line(event))

        yield listen


@contextmanager
def study_progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """What listens to a study: one line, with the time left over all its training cells."""
    with _live() as bar:
        task = bar.add_task("", total=1.0, facts="")
        place = {"number": 0, "total": 1, "text": ""}

        def listen(event: dict[str, Any]) -> None:
            kind = event["event"]
            if kind == "cell":
                place.update(event)
                text = f"{event['number'] + 1}/{event['total']} {event['text']}"
                bar.update(task, completed=event["number"] / event["total"], description=text, facts="")
                if not bar.live.is_started:
                    output.say(text)
            elif kind == "step":
                done = (event["epoch"] + event["done"]) / event["epochs"]
                bar.update(task, completed=(place["number"] + done) / place["total"], facts=_step_facts(event))
            elif kind == "stage":
                bar.update(task, completed=1.0, description=event["text"], facts="")
                if not bar.live.is_started:
                    output.say(event["text"])
            elif kind == "note":
                output.say(event["text"])

        yield listen


def _live() -> Progress:
    """A progress bar on stderr, on a terminal only."""
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(), TextColumn("left"),
        console=err, transient=True, disable=output.quiet or not err.is_terminal,
    )  # fmt: skip


def _step_facts(event: dict[str, Any]) -> str:
    return f"loss {event['loss']:.3f}  top-1 {event['top1_pct']:.1f} %  {event['throughput_img_s']:,.0f} img/s"


def _epoch_line(event: dict[str, Any]) -> str:
    return (
        f"epoch {event['epoch']}/{event['epochs']}: loss {event['train_loss']:.3f}, "
        f"validation {event['validation_top1_pct']:.2f} %, {event['images'] / event['train_seconds']:,.0f} images/s"
    )


@contextmanager
def bench_progress(total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What listens to a bench: on a terminal the cells as they come, above a bar; elsewhere a line a cell."""
    from rich.console import Group
    from rich.live import Live

    bar, done = _live(), list[str]()
    task = bar.add_task("bench", total=total, facts="")
    with Live(bar, console=err, transient=True, refresh_per_second=1) if not bar.disable else nullcontext() as live:

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                bar.update(task, description=str(event["cell"]), facts=event["text"])
                return
            record = event["record"]
            done.append(_cell_line(record.config, record.status, record.metrics))
            bar.update(task, completed=event["done"], total=event["total"])
            if live is None:
                output.say(done[-1])
            else:
                live.update(Group(*map(Text, done[-15:]), bar))

        yield listen


def _cell_line(config: Mapping[str, Any], status: str, m: Mapping[str, Any]) -> str:
    """A finished cell in one line."""
    place = ", ".join(str(config[name]) for name in ("mode", "precision", "execution"))
    place = f"{attention_name(config['attention'])}, N = {config['tokens']}, batch {config['batch_size']}, {place}"
    if status != "ok":
        return f"{place}: {status}"
    held = "" if m.get("peak_memory_mib") is None else f", {short(m['peak_memory_mib'])} MiB"
    return f"{place}: {short(m['latency_ms'])} ms ({short(m['latency_low_ms'])} to {short(m['latency_high_ms'])}){held}"


@contextmanager
def counted_progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A plain bar over a known number of things."""
    with _live() as bar:
        task = bar.add_task(text, total=total, facts="")
        yield lambda done: bar.update(task, completed=done)


def make_table(
    columns: Sequence[str], rows: list[list[str]], title: str = "", notes: Sequence[str] = (), lines: bool = True
) -> Table:
    """A table of text, with notes below; columns of numbers are aligned to the right. `lines`: around the cells."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", caption_justify="left")
    if not lines:
        table.box, table.padding, table.pad_edge = None, (0, 2, 0, 0), False
    table.caption = escape("\n".join(notes)) if notes else None
    for place, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[place]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def make_list(title: str, facts: Mapping[str, str]) -> Table:
    """Names and texts below a title, the texts wrapped."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.title, table.title_justify = escape(title), "left"
    for name, text in facts.items():
        table.add_row(escape(name), escape(text))
    return table


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).replace("-", "", 1).isdigit() or text in ("", "–")


def short(value: float | None, factor: float = 1) -> str:
    """A number with three digits, or a dash."""
    if value is None:
        return "–"
    value *= factor
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def text_of(value: Any) -> str:
    """Any value in a table; a dash for none."""
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
