"""Draw the figures of the documentation from the stored results, without a new measurement.

    python bench/figures.py                    # all of them, into docs/images
    python bench/figures.py budget speed --out FOLDER

Each figure is that of the script that wrote its CSV file in bench/results: budget.py, speed.py, memory.py and drift.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kit import arithmetics, memory_row, time_row
from pages import budget_figure, drift_figure, memory_figure, report, speed_figure
from pages.style import save

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stored:
    """A figure's file of rows in bench/results, their class, and the function that draws them."""

    rows: str
    kind: type[Any]
    draw: Callable[[list[Any]], Figure]

    def figure(self) -> Figure:
        return self.draw(report.read(ROOT / "bench" / "results" / self.rows, self.kind))


FIGURES = {
    "budget": Stored("budget-cpu.csv", time_row.Row, budget_figure.draw),
    "speed": Stored("speed-cpu.csv", time_row.Row, speed_figure.draw),
    "memory": Stored("memory-predicted.csv", memory_row.Row, memory_figure.draw),
    "memory-depth": Stored("memory-depth.csv", memory_row.Row, memory_figure.draw),
    "memory-steps": Stored("memory-steps.csv", memory_row.Row, memory_figure.draw),
    "drift": Stored("drift-cpu.csv", arithmetics.Row, drift_figure.draw),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"figures to draw: {', '.join(FIGURES)} (all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures (docs/images)"
    )
    a = parser.parse_args()
    unknown = [name for name in a.figures if name not in FIGURES]
    if unknown:
        parser.error(f"there is no figure {', '.join(unknown)}; choose from {', '.join(FIGURES)}")
    if not a.out.is_dir():
        parser.error(f"--out {a.out}: there is no such folder")
    for name in a.figures or FIGURES:
        path = a.out / f"{name}.png"
        save(FIGURES[name].figure(), path)
        print(path)


if __name__ == "__main__":
    main()
