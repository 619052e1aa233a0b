"""What the benchmarks have in common: their options' types, what ran on what, and tables for the terminal and for files."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure


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
    """The options that `write` follows."""
    parser.add_argument("--json", type=output(".json"), help="write the rows to this file")
    parser.add_argument("--csv", type=output(".csv"), help="write the rows to this file")
    parser.add_argument("--markdown", type=output(".md"), help="write the tables to this file")
    if figure:
        parser.add_argument("--figure", type=output(".png", ".pdf", ".svg"), help="draw the rows")


def write(
    a: argparse.Namespace, rows: Sequence[Any], page: str, draw: Callable[[Sequence[Any]], Figure] | None = None
) -> None:
    """The rows, dataclasses of one kind, to those files that were asked for."""
    fields = [asdict(row) for row in rows]
    if a.json:
        a.json.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    if a.csv:
        with a.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(fields[0]))
            writer.writeheader()
            writer.writerows(fields)
    if a.markdown:
        a.markdown.write_text(page, encoding="utf-8")
    if draw and a.figure:
        figure = draw(rows)
        with plt.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):  # text stays text
            figure.savefig(a.figure, dpi=160)
        plt.close(figure)


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


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> None:
    """Print a table, at its full width; the columns named in `left` are aligned to the left."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in headings:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> str:
    rules = [":--" if name in left else "--:" for name in headings]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, rules, *rows])


def markdown(title: str, about: str, sections: Iterable[str]) -> str:
    """A page of results, with the date and the command; the sections stand apart."""
    script, *arguments = sys.argv
    command = shlex.join(["python", f"bench/{Path(script).name}", *arguments])
    head = f"# {title}\n\n- date: {date.today()}\n- command: `{command}`\n- {about}\n"
    return "\n".join([head, *(section.strip("\n") + "\n" for section in sections if section)])
