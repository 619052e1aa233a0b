"""Tables in the README and in docs/ are those of the stored results, which bench/ wrote."""

import re

import pytest
from pages import RESULTS, ROOT, stored, table

from experiment_plan import CREVNET, WIDTHS
from experiment_tables import COLUMNS, over_seeds
from memory_figures import name_of
from memory_row import GIB, Row


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/crevnet.md", 17)])
def test_memory_of_crevnet(page, count):
    expected = {}
    for line in stored("memory-predicted.csv"):
        given = line | {name: int(line[name] or 0) for name in ("patch", "peak", "one_more")}
        row = Row(**given)
        figures = f"{row.peak / GIB:.1f}", f"{row.one_more / GIB:.2f}", row.largest_16, row.largest_32
        expected[name_of(row), row.schedule] = [*figures]
    _, rows = table(page, "model, 495 x 436")
    assert len(rows) == count
    for name, schedule, *figures in rows:
        assert figures == expected[name, schedule]


def test_scores_of_the_demo():
    text = (RESULTS / "crevnet-tiny-cpu.md").read_text(encoding="utf-8")
    expected = {round(float(figure), 5) for figure in re.findall(r"\d\.\d{3}e-\d", text)}
    _, rows = table("README.md", "forecast")
    assert len(rows) == 6
    assert {float(score) for _, score in rows} <= expected


def by_method(results, network):
    return {
        f"{line['method']} {line['setting']}".strip(): line for line in stored(results) if line["network"] == network
    }


@pytest.mark.parametrize("network", ["tiny", "convolutions", "transformer"])
def test_time(network):
    expected = by_method("speed-cpu.csv", network)
    headings, rows = table("docs/memory.md", "time, plain = 1")
    assert network in headings and len(rows) > 5
    for method, *times in rows:
        assert times[headings.index(network) - 1] == f"{float(expected[method]['time_ratio']):.2f}"


@pytest.mark.parametrize("network", ["convolutions", "transformer"])
def test_memory_against_time(network):
    expected = by_method("budget-cpu.csv", network)
    headings, rows = table("docs/index.md", "memory and time, plain = 1")
    column = headings.index(f"{network}: memory")
    assert len(rows) > 5
    for cells in rows:
        line = expected[cells[0]]
        memory = float(line["peak"]) / float(expected["plain"]["peak"])
        assert cells[column : column + 2] == [f"{memory:.2f}", f"{float(line['time_ratio']):.2f}"]


@pytest.mark.parametrize(
    ("first_heading", "named"),
    [
        ("MSE, CrevNet", [("stages", stage) for stage in COLUMNS]),
        ("MSE, at equal memory and time", [("models", name) for name in (CREVNET, *WIDTHS)]),
    ],
)
def test_the_experiment(first_heading, named):
    headings, rows = table("README.md", first_heading)
    assert len(headings) == 1 + len(named)
    for data, *cells in rows:
        if data.startswith("the paper"):
            continue
        name, seeds = re.fullmatch(r"(.+), (\d) seeds?", data).groups()
        lines = stored(f"experiment-{name.replace('synthetic ', '').replace(' ', '-')}.csv")
        assert len({line["seed"] for line in lines}) == int(seeds)
        for cell, (kind, what) in zip(cells, named, strict=True):
            found = [float(line["mse"]) for line in lines if (line["table"], line["name"]) == (kind, what)]
            assert cell == over_seeds(found), (data, what)


def test_each_picture_was_drawn_by_a_command_that_is_told():
    told = " ".join(page.read_text(encoding="utf-8") for page in RESULTS.glob("*.md"))
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        of_the_demo = picture.stem == "demo" or picture.stem.startswith("figures-")
        assert of_the_demo or re.search(rf"--(figure|out) docs/images/{picture.name}", told), picture


def test_each_page_of_results_tells_its_command_and_the_versions():
    for page in RESULTS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"(python (bench|examples)/|crevnet fit|crevnet evaluate)", text), page
        assert re.search(r"torch 2\.\d+", text) and re.search(r"20\d\d-\d\d-\d\d", text), page
