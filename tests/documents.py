"""Pages of the documentation, and the stored results that they quote, as tests read them."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def prose(path):
    """The file's text in one line."""
    return " ".join(path.read_text(encoding="utf-8").split())


def stored(name):
    """The rows of a CSV file of results."""
    with (RESULTS / name).open(newline="") as file:
        return [*csv.DictReader(file)]


def table(page, first_heading):
    """The cells of the page's table whose first heading is this, without markup, and its headings."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    cells = [[cell.strip() for cell in re.sub("[*`]", "", line).strip("|").split("|")] for line in lines[start:end]]
    headings, _, *rows = cells
    return headings, rows
