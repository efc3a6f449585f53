"""The runs in a results folder: list them, show one, remove one's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vitcmp import store
from vitcmp.configs import UserError, attention_name
from vitcmp.models.checkpoint import load_info


def overview(results: str) -> list[dict[str, Any]]:
    """One row a run folder, oldest first: id, status, attention, dataset, seed, epochs, top1_pct."""
    records = {record.id: record for record in store.read(results)}
    rows = []
    for path in sorted((Path(results) / "runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime):
        folder = path.parent
        try:
            config: dict[str, Any] = load_info(folder).config
        except UserError:
            config = {}
        record = records.get(folder.name)
        rows.append({
            "run": folder.name,
            "status": record.status if record else "damaged" if not config else "unfinished",
            "attention": attention_name(config["attention"]) if config else None,
            "dataset": config.get("dataset"),
            "seed": config.get("seed"),
            "epochs": f"{len(store.read_log(folder))}/{config.get('epochs')}",
            "top1_pct": record.metrics.get("top1_pct") if record else None,
        })  # fmt: skip
    return rows


def show(results: str, run: str) -> dict[str, Any]:
    """Everything about one run: its record if it has ended, else its configuration, and its log."""
    folder = store.find_run(results, run)
    record = next((r for r in store.read(results) if r.id == folder.name), None)
    about = record.model_dump() if record else {"status": "unfinished", "config": load_info(folder).config}
    return {"folder": str(folder), **about, "log": store.read_log(folder)}


def remove(results: str, run: str) -> Path:
    """Delete a run's folder; its record, which is never edited, stays in the store."""
    folder = store.find_run(results, run)
    if folder.resolve().parent != (Path(results) / "runs").resolve():
        raise UserError(f"'{run}' is not in {Path(results) / 'runs'}; delete it yourself")
    shutil.rmtree(folder)
    return folder
