"""The files of a stage and of the summary: JSON for programs, Markdown for readers."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from gpu_stages.process import Outcome
from gpu_stages.stage import Row, Setup
from pages import report
from pages.tables import markdown_table


def write_stage(outcome: Outcome, setup: Setup) -> None:
    fields = {**asdict(outcome), "date": date.today().isoformat(), "device": setup.device, "toy": setup.toy}
    _replace(setup.out / f"{outcome.stage}.json", json.dumps(fields, indent=1, default=str) + "\n")
    state = f"{outcome.status}, {outcome.seconds:.0f} s, {len(outcome.rows)} rows"
    reason = f"{state}: {outcome.error}" if outcome.error else state
    sections = [f"Status: {reason}", *tables(outcome.rows), *_details(outcome)]
    _replace(setup.out / f"{outcome.stage}.md", report.markdown(outcome.title, _about(outcome, setup), sections))


def write_summary(outcomes: Sequence[Outcome], setup: Setup) -> None:
    rows = [
        {"stage": o.stage, "status": o.status, "seconds": o.seconds, "rows": len(o.rows), "error": o.error}
        for o in outcomes
    ]
    fields = {"date": date.today().isoformat(), "device": setup.device, "toy": setup.toy, "stages": rows}
    _replace(setup.out / "summary.json", json.dumps(fields, indent=1) + "\n")
    about = _about(next((o for o in outcomes if o.about), outcomes[0]), setup)
    _replace(setup.out / "summary.md", report.markdown("GPU benchmarks", about, tables(rows)))


def tables(rows: Iterable[Row]) -> list[str]:
    """A table for the rows of each kind: those with the same names."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return [_table(names, found) for names, found in kinds.items()]


def _table(names: Sequence[str], rows: Sequence[Row]) -> str:
    headings = [_heading(name) for name in names]
    left = [h for h, name in zip(headings, names, strict=True) if any(isinstance(row[name], str) for row in rows)]
    return markdown_table(headings, ([_cell(name, row[name]) for name in names] for row in rows), left)


def _heading(name: str) -> str:
    return (
        f"{name.removesuffix('_bytes')}, MiB".replace("_", " ") if name.endswith("_bytes") else name.replace("_", " ")
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _details(outcome: Outcome) -> list[str]:
    parts = {"Traceback": outcome.traceback, "Last lines printed": outcome.log}
    return [f"## {title}\n\n```text\n" + "\n".join(lines) + "\n```" for title, lines in parts.items() if lines]


def _about(outcome: Outcome, setup: Setup) -> str:
    about = outcome.about or f"{platform.machine()}, Python {platform.python_version()}, device {setup.device}"
    return f"{about}, toy size" if setup.toy else about


def _replace(path: Path, text: str) -> None:
    """Replace the file at once, so that no reader gets a part of it."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
