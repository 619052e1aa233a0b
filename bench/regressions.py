"""Compare the engine's hot paths with stored ratios (`make bench`), or store new ratios instead (`make bench-store`).

    python bench/regressions.py run-1.json run-2.json run-3.json

pytest-benchmark writes one file per run of bench/test_hot_paths.py. A path's ratio is the engine's time over standard
autograd's. A run's ratio is the median of its rounds. The median of the runs counts, because two processes differ by more than
the rounds of one. A path fails if its ratio exceeds the stored one by more than the margin, or if it is stored and was not run.
Exit status: 1 if a path fails, 2 if a file cannot be used.

The margin is above the noise: of four runs on two cores with a load of five, one path's ratios were 9 % apart, the others'
less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pages import report
from pages.tables import show

STORED = Path(__file__).parent / "results" / "hot-paths.json"


@dataclass(frozen=True)
class Ratio:
    """A hot path's time, standard autograd's being 1."""

    median: float
    """Of the runs."""
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lowest:.3f} to {self.highest:.3f})"


class UnusableError(Exception):
    """A file that cannot be used: one line with its name and the remedy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="files of pytest-benchmark")
    parser.add_argument("--stored", type=Path, default=STORED, help="file of ratios to compare with (%(default)s)")
    parser.add_argument(
        "--store", action="store_true", help="storage of the ratios in that file, instead of a comparison"
    )
    parser.add_argument("--margin", type=report.positive, default=10, help="margin, per cent (%(default)s)")
    a = parser.parse_args()
    try:
        now = ratios(a.runs)
        if a.store:
            store(now, a.stored)
            print(f"stored the ratios of {len(now)} hot paths in {a.stored}")
            return
        about, stored = load(a.stored)
    except UnusableError as error:
        parser.error(str(error))
    verdicts = compare(stored, now, a.margin / 100)
    rows = [
        (path, str(stored.get(path, "")), str(now.get(path, "")), change(stored.get(path), now.get(path)), verdict)
        for path, verdict in verdicts.items()
    ]
    show("Time, standard autograd = 1: median of runs, lowest to highest", HEADINGS, rows, LEFT)
    print(f"stored: {about}\nnow: {date.today()}, {here()}\nmargin: {a.margin} %")
    failed = [path for path, verdict in verdicts.items() if verdict in (SLOWER, MISSING)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


HEADINGS = ("hot path", "stored", "now", "change", "")
LEFT = ("hot path", "")
SLOWER, FASTER, SAME, NEW, MISSING = "SLOWER", "faster", "", "not stored yet", "NOT RUN"


def compare(stored: dict[str, Ratio], now: dict[str, Ratio], margin: float) -> dict[str, str]:
    """A verdict for each path."""
    verdicts = {}
    for path in dict.fromkeys([*stored, *now]):
        if path not in now:
            verdicts[path] = MISSING
        elif path not in stored:
            verdicts[path] = NEW
        else:
            quotient = now[path].median / stored[path].median
            verdicts[path] = SLOWER if quotient > 1 + margin else FASTER if quotient < 1 - margin else SAME
    return verdicts


def change(stored: Ratio | None, now: Ratio | None) -> str:
    return f"{now.median / stored.median - 1:+.1%}" if stored and now else ""


def ratios(runs: list[Path]) -> dict[str, Ratio]:
    """Every hot path's ratio, over the runs that have it."""
    medians: dict[str, list[float]] = defaultdict(list)
    for path in runs:
        content = read(path)
        try:
            found = {case["group"]: statistics.median(case["extra_info"]["ratios"]) for case in content["benchmarks"]}
            if not found or not all(0 < median < float("inf") for median in found.values()):
                raise ValueError("no ratios")
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableError(
                f"{path} has no ratios of hot paths: create it as bench/test_hot_paths.py describes"
            ) from error
        for name, median in found.items():
            medians[name].append(median)
    return {name: Ratio(statistics.median(of_runs), min(of_runs), max(of_runs)) for name, of_runs in medians.items()}


def store(found: dict[str, Ratio], path: Path) -> None:
    content = {
        "date": str(date.today()),
        "machine": here(),
        "ratios": {name: asdict(ratio) for name, ratio in found.items()},
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UnusableError(f"{path} cannot be written ({error.strerror})") from error


def load(path: Path) -> tuple[str, dict[str, Ratio]]:
    """The date and machine of the stored ratios, and the ratios."""
    if not path.exists():
        raise UnusableError(f"{path} does not exist: write it first, with --store")
    content = read(path)
    try:
        stored = {name: Ratio(**{k: float(v) for k, v in ratio.items()}) for name, ratio in content["ratios"].items()}
        if not all(0 < ratio.median < float("inf") for ratio in stored.values()):
            raise ValueError("no ratios")
        return f"{content['date']}, {content['machine']}", stored
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableError(f"{path} is not in the format of --store: store the ratios again") from error


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UnusableError(f"{path} is not JSON: create it again") from error


def here() -> str:
    return report.machine(torch.device("cpu"))


if __name__ == "__main__":
    main()
