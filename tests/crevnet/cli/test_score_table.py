"""The tables of scores: what is bold, what is in which column, and how wide they are."""

import math
from dataclasses import fields

import pytest
from rich.console import Console

from crevnet.cli.score_table import fitting_tables, score_tables
from crevnet.data.files.layouts import layout_named
from crevnet.evaluation.scores import Scores

CITY, VIDEOS = layout_named("2019"), layout_named("movies")


def scores(number, channels=2, horizons=2):
    values = dict.fromkeys((field.name for field in fields(Scores)), number)
    for end, count in (("by_channel", channels), ("by_horizon", horizons)):
        values |= {name: (number, 10 * number, *[number] * (count - 2)) for name in values if name.endswith(end)}
    return Scores(**values | {"mse_on_roads": number / 2, "mse_summed": number * 64})


def tables(found, layout=CITY, width=200):
    return list(score_tables(found, 2, (1, 2), layout, width))


def cells(column):
    return [str(cell) for cell in column.cells]


@pytest.mark.parametrize("measure", range(4))
def test_the_best_of_each_measure_is_bold(measure):
    overview, *_ = tables({"low": scores(1.0), "high": scores(2.0), "none": scores(math.nan)})
    names, column = cells(overview.columns[0]), list(overview.columns[1 + measure].cells)
    bold = [name for name, cell in zip(names, column, strict=True) if cell.style == "bold"]
    assert bold == (["low"] if measure < 2 else ["high"])  # low errors are best, high PSNR and SSIM


def test_without_a_figure_nothing_is_bold():
    overview, *_ = tables({"none": scores(math.nan)})
    assert not any(cell.style for column in overview.columns for cell in column.cells)
    assert "SSIM requires frames of at least" in overview.caption


def test_columns():
    overview, mse, *others = tables({"one": scores(1.0)})
    columns = ["MSE", "MAE", "PSNR, dB", "SSIM", "summed", "on roads"]
    assert [column.header for column in overview.columns][1:] == columns
    shown = [cells(column)[0] for column in overview.columns]
    assert shown == ["one", "1.000e+00", "1.000e+00", "1.00", "1.0000", "64.00", "5.000e-01"]
    assert mse.title == "MSE by channel and horizon" and len(others) == 3
    assert [column.header for column in mse.columns][1:] == ["volume", "speed", "+5 min", "+10 min"]
    assert [cells(column)[0] for column in mse.columns][1:] == ["1.000e+00", "1.000e+01"] * 2


def test_videos_have_no_column_of_roads():
    overview, *_ = tables({"one": scores(1.0)}, VIDEOS)
    assert "on roads" not in [column.header for column in overview.columns]


@pytest.mark.parametrize("name", ["mean of training days", "CrevNet, /a/folder/with/quite/a/long/path/of/a/run"])
def test_tables_fit_eighty_columns_and_cut_nothing(name):
    found = list(score_tables({name: scores(1.0, 8, 6)}, 8, (1, 2, 3, 6, 9, 12), layout_named("2021"), 80))
    console = Console(width=80)
    with console.capture() as captured:
        for table in found:
            console.print(table)
    text = captured.get()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    headers = [column.header for table in found if (table.title or "").startswith("MSE") for column in table.columns]
    assert len([header for header in headers if header != "forecast"]) == 14


def test_groups_share_a_table_if_they_fit():
    groups = {"": {"score": ["0.1"]}, "channel": {"a": ["0.2"], "b": ["0.3"]}, "city": {key: ["0.4"] for key in "cdef"}}
    wide, narrow = (list(fitting_tables("score", ["one"], groups, width)) for width in (80, 25))
    assert [table.title for table in wide] == ["score by channel and city"]
    assert [table.title for table in narrow] == ["score by channel", "score by city", "score by city"]
    assert [len(table.columns) for table in narrow] == [4, 3, 3]
