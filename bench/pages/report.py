"""Results in files: the options for them, rows as JSON and CSV, pages with their command, and the machine."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform
import shlex
import sys
from ast import literal_eval
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

    R = TypeVar("R", bound=DataclassInstance)


def positive(text: str) -> int:
    """An option's type: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def output(*suffixes: str) -> Callable[[str], Path]:
    """An option's type: a file to write, in a folder that exists, with one of the suffixes, if any are given."""

    def checked(text: str) -> Path:
        path = Path(text)
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a folder")
        if suffixes and path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{path}: the name must end in {' or '.join(suffixes)}")
        return path

    return checked


def add_outputs(parser: argparse.ArgumentParser, figure: bool = True) -> None:
    """The options of `write`."""
    parser.add_argument("--json", type=output(".json"), help="JSON file to write the rows to")
    parser.add_argument("--csv", type=output(".csv"), help="CSV file to write the rows to")
    parser.add_argument("--markdown", type=output(".md"), help="Markdown file to write the tables to")
    if figure:
        parser.add_argument("--figure", type=output(".png", ".pdf", ".svg"), help="picture to draw, .png, .pdf or .svg")


def write(a: argparse.Namespace, rows: Sequence[R], page: str, draw: Callable[[list[R]], Figure] | None = None) -> None:
    """Write the rows, dataclasses of one kind, to the files that the options name."""
    entries = [asdict(row) for row in rows]
    if a.json:
        a.json.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    if a.csv:
        with a.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    if a.markdown:
        a.markdown.write_text(page, encoding="utf-8")
    if draw and a.figure:
        from pages.style import save

        save(draw([*rows]), a.figure)


def read(path: Path, kind: type[R]) -> list[R]:
    """The rows that `write` has stored as CSV. Fields that an older file lacks have their defaults."""
    types = {field.name: str(field.type) for field in fields(kind)}
    with path.open(encoding="utf-8", newline="") as file:
        lines = [*csv.DictReader(file)]
    return [kind(**{name: _value(text, types[name]) for name, text in line.items()}) for line in lines]


def _value(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if not text:
        return None
    return text if kind == "str | None" else literal_eval(text)


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device, threads: int = 1, packages: Iterable[str] = ()) -> str:
    """The hardware, and the versions of Python, torch and those packages that are installed."""
    cpu = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    names = [f"{name} {version}" for name in packages if (version := version_of(name))]
    return ", ".join([hardware, f"Python {platform.python_version()}", f"torch {torch.__version__}", *names])


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown(title: str, about: str, sections: Iterable[str]) -> str:
    """A page of results, with the date and the command, and an empty line between sections."""
    script, *arguments = sys.argv
    command = shlex.join(["python", f"bench/{Path(script).name}", *arguments])
    head = f"# {title}\n\n- date: {date.today()}\n- command: `{command}`\n- {about}\n"
    return "\n".join([head, *(section.strip("\n") + "\n" for section in sections if section)])
