"""The tables of scores: what is bold, and what is in which column."""

import math
from dataclasses import fields

import pytest

from crevnet.cli.score_table import score_tables
from crevnet.evaluation.scores import Scores


def scores(number):
    values = dict.fromkeys((field.name for field in fields(Scores)), number)
    several = {name: (number, 10 * number) for name in values if name.endswith(("by_channel", "by_horizon"))}
    return Scores(**{**values, **several, "mse_on_roads": number / 2, "mse_summed": number * 64})


@pytest.mark.parametrize("measure", range(4))
def test_the_best_of_each_measure_is_bold(measure):
    table = list(score_tables({"low": scores(1.0), "high": scores(2.0), "none": scores(math.nan)}, "ab", "cd", True))[
        measure
    ]
    bold = [name for name, row in zip(table.columns[0].cells, table.rows, strict=True) if row.style == "bold"]
    assert bold == (["low"] if measure < 2 else ["high"])  # errors are to be low, PSNR and SSIM high


def test_where_there_is_no_figure_nothing_is_bold():
    assert not any(
        row.style for table in score_tables({"none": scores(math.nan)}, "ab", "cd", True) for row in table.rows
    )


def test_columns():
    mse, mae, *_ = score_tables({"one": scores(1.0)}, ["volume", "speed"], ["+5 min", "+10 min"], True)
    columns = ["MSE", "summed", "on roads", "volume", "speed", "+5 min", "+10 min"]
    assert [column.header for column in mse.columns][1:] == columns
    assert [column.header for column in mae.columns][1:] == ["MAE", "volume", "speed", "+5 min", "+10 min"]
    shown = [next(iter(column.cells)) for column in mse.columns]
    assert shown == ["one", "1.000e+00", "64.00", "5.000e-01", "1.000e+00", "1.000e+01", "1.000e+00", "1.000e+01"]


def test_movies_have_no_column_of_roads():
    mse, *_ = score_tables({"one": scores(1.0)}, "ab", "cd", False)
    assert [column.header for column in mse.columns][1:] == ["MSE", "summed", "a", "b", "c", "d"]
    assert [next(iter(column.cells)) for column in mse.columns][:4] == ["one", "1.000e+00", "64.00", "1.000e+00"]
