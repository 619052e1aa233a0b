"""bench/figures.py: drawn from the stored rows, in one style, with labels that cover nothing."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
from documents import RESULTS, ROOT, stored
from matplotlib.colors import to_hex
from matplotlib.text import Text

import drift
import figures
from kit import methods, schedules
from kit.arithmetics import Row
from kit.libraries import PEERS
from pages import labels, memory_figure, report
from pages.style import STYLES


@pytest.fixture(scope="module")
def drawn():
    return {name: stored.figure() for name, stored in figures.FIGURES.items()}


def test_all_are_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path)])
    figures.main()
    names = [f"{name}.png" for name in figures.FIGURES]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [Path(line).name for line in capsys.readouterr().out.split()] == names
    assert all((ROOT / "docs" / "images" / name).is_file() for name in names)


def texts(figure):
    return [text.get_text() for panel in figure.axes for text in panel.texts if text.get_text()]


def test_bars_of_time_are_the_stored_ones(drawn):
    ratios = [f"{float(row['time_ratio']):.2f}" for row in stored("speed-cpu.csv") if row["time_ratio"]]
    assert [text for text in texts(drawn["speed"]) if text[0].isdigit()] == ratios


def test_bars_of_memory_are_linear_and_cut_with_their_sizes(drawn):
    left, right = drawn["memory"].axes
    peaks = [int(row["peak"]) / 2**30 for row in stored("memory-predicted.csv")]
    for axes, longest in zip((left, right), memory_figure.ENDS, strict=True):
        assert axes.get_xscale() == "linear" and axes.get_xlim() == (0, longest)
    assert [bar.get_width() for bar in left.patches] == pytest.approx(
        [min(peak, memory_figure.ENDS[0]) for peak in peaks]
    )
    assert {"369", "60.3", "62.7"} <= {text.get_text() for text in left.texts}


def test_a_method_has_one_color(drawn):
    """In the lines of one figure and the bars of another."""
    lines = {to_hex(line.get_color()) for panel in drawn["budget"].axes for line in panel.lines}
    assert lines <= {style.color for style in STYLES.values()}
    bars = {to_hex(bar.get_facecolor()) for panel in drawn["speed"].axes for bar in panel.patches}
    assert bars <= {style.color for style in STYLES.values()}
    names = [style.name for style in STYLES.values()]
    assert len({*names}) == len({style.color for style in STYLES.values()}) == len(names) - 1  # revflow has two keys


def test_every_method_and_schedule_has_a_style():
    made = [
        methods.plain(),
        methods.checkpointed(1),
        methods.selective(),
        methods.offloaded(),
        methods.reversible("min"),
    ]
    assert {*PEERS, *schedules.SCHEDULES, *(method.name for method in made)} <= STYLES.keys()


def test_labels_are_inside_and_overlap_no_other(drawn):
    drawn["budget"].draw_without_rendering()
    for panel in drawn["budget"].axes:
        boxes = [Text.get_window_extent(text) for text in panel.texts]  # without their lines
        assert boxes and not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(panel.bbox.fully_containsx(x) for box in boxes for x in (box.x0, box.x1))


def test_a_label_covers_no_point():
    figure = figures.Figure((4, 3))
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5, 0.5), (0.5, 0.6), (0.45, 0.4)]
    labels.place(axes, [labels.Label("a label", points[0], "black")], points)
    (box,) = [text.get_window_extent() for text in axes.texts]
    assert not any(box.contains(*axes.transData.transform(point)) for point in points)


def test_points_of_drift_are_those_of_its_page():
    rows = report.read(RESULTS / "drift-cpu.csv", Row)
    page = (RESULTS / "drift-cpu.md").read_text()
    for name in ("rebuilt", "gradients"):
        assert drift.table(name, rows) in page


def test_rows_are_read_as_they_were_written(tmp_path):
    for stored_figure in figures.FIGURES.values():
        rows = report.read(RESULTS / stored_figure.rows, stored_figure.kind)
        report.write(report.argparse.Namespace(json=None, csv=tmp_path / "rows.csv", markdown=None), rows, "")
        assert report.read(tmp_path / "rows.csv", stored_figure.kind) == rows


@pytest.mark.parametrize("options", [["none"], ["--out", "/no/such/folder"]])
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["figures.py", *options])
    with pytest.raises(SystemExit) as error:
        figures.main()
    assert error.value.code == 2 and options[-1] in capsys.readouterr().err
