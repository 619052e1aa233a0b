"""Held-out test cases, whose making is killed and repeated."""

import os
import signal
from functools import partial

import numpy as np
import pytest
from practice import write_array
from processes import at_call, end, kill, start

SLOT = 14


def killed_before_the_name_of(number):
    """Of the `number`-th file."""
    at_call(os, "replace", number, kill)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hours(tmp_path_factory):
    """Two days of 2021."""
    root, rng = tmp_path_factory.mktemp("hours"), np.random.default_rng(0)
    for day in (1, 2):
        frames = rng.integers(0, 256, (60, 5, 4, 8), dtype=np.uint8)
        write_array(root / "BERN" / "training" / f"2019-01-0{day}_BERN_8ch.h5", frames)
    return root


@pytest.fixture(params=["2019", "2021"])
def arguments(request, cities, hours):
    if request.param == "2019":
        return ("data", "holdout", "--data.root", cities, "--slots", f"[{SLOT}]")
    return ("data", "holdout", "--protocol", "2021", "--data.root", hours)


@pytest.mark.parametrize("number", [2, 3])
def test_killed_and_repeated(number, arguments, crevnet, tmp_path):
    """2019 writes a truth and a test day of each of two cities, 2021 three files."""
    crevnet(*arguments, "--out", tmp_path / "whole")
    out = ("--out", tmp_path / "out")
    process = start((*arguments, *out), tmp_path / "said", partial(killed_before_the_name_of, number))
    assert end(process) == -signal.SIGKILL
    named = [name for name in contents(tmp_path / "out") if name.endswith(".h5")]
    assert len(named) == number - 1
    crevnet(*arguments, *out)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_repeated_when_it_is_done(arguments, crevnet, tmp_path):
    out = ("--out", tmp_path / "out")
    crevnet(*arguments, *out)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.h5")}
    crevnet(*arguments, *out)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.h5")} == before


def test_another_draw_is_refused(arguments, crevnet, failing, tmp_path):
    out = ("--out", tmp_path / "out")
    crevnet(*arguments, *out)
    before = contents(tmp_path / "out")
    other = ("--slots", "[13]") if "2021" not in arguments else ("--count", "1")
    line = failing(*arguments, *out, *other)
    assert "already exists and is not overwritten" in line
    assert contents(tmp_path / "out") == before


def test_the_next_commands_have_the_slots(own_cities, crevnet, tmp_path):
    out = tmp_path / "test"
    said = crevnet(
        "data", "holdout", "--data.root", own_cities, "--data.cities=[Here]", "--out", out, "--slots", "[14]"
    )
    assert f"crevnet submit RUN --test {out} --slots '[14]' --out FOLDER" in said
    assert "crevnet score --protocol 2019 --slots '[14]' FOLDER" in said
