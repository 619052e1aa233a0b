"""The README's tables are the stored results, which bench/ wrote."""

import csv
import re
from pathlib import Path

import pytest

from memory_figures import name_of
from memory_row import GIB, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def stored(name):
    with (RESULTS / name).open(newline="") as file:
        return [*csv.DictReader(file)]


def table(first_heading):
    """The cells of the README's table whose first heading is this, without markup, and its headings."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    cells = [[cell.strip() for cell in re.sub("[*`]", "", line).strip("|").split("|")] for line in lines[start:end]]
    headings, _, *rows = cells
    return headings, rows


def test_memory():
    expected = {}
    for line in stored("memory-predicted.csv"):
        given = line | {name: int(line[name] or 0) for name in ("patch", "peak", "one_more")}
        row = Row(**given)
        figures = f"{row.peak / GIB:.1f}", f"{row.one_more / GIB:.2f}", row.largest_16, row.largest_32
        expected[name_of(row), row.schedule] = [*figures]
    _, rows = table("model, 495 x 436")
    assert len(rows) > 10
    for name, schedule, *figures in rows:
        assert figures == expected[name, schedule]


@pytest.mark.parametrize("network", ["tiny", "convolutions", "transformer"])
def test_speed(network):
    expected = {
        f"{line['method']} {line['setting']}".strip(): f"{float(line['time_ratio']):.2f}" if line["time_ratio"] else ""
        for line in stored("speed-cpu.csv")
        if line["network"] == network
    }
    headings, rows = table("time, plain = 1")
    assert network in headings and len(rows) > 5
    for method, *times in rows:
        assert times[headings.index(network) - 1] == expected.get(method, "")


def test_each_page_of_results_tells_its_command_and_the_versions():
    for page in RESULTS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"(python bench/|crevnet fit|crevnet evaluate)", text), page
        assert re.search(r"torch 2\.\d+", text) and re.search(r"20\d\d-\d\d-\d\d", text), page
