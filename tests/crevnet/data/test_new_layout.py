"""The file format that CONTRIBUTING.md adds: one file and one name."""

import re
import sys
from pathlib import Path
from typing import Literal, get_args

import h5py
import pytest

from crevnet.data import files
from crevnet.data.files import protocol
from crevnet.data.files.days import open_days
from crevnet.data.files.layouts import layout_named, layout_of

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def example(tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").partition("## Add a file format")[2].partition("\n## ")[0]
    (tmp_path / "layout_radar.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    monkeypatch.setattr(files, "__path__", [*files.__path__, str(tmp_path)])
    *others, last = get_args(protocol.LayoutName)
    names = Literal[(*others, "radar", last)]
    for module in ("crevnet.data.files.protocol", "crevnet.data.files.layouts", "crevnet.data.settings"):
        monkeypatch.setattr(f"{module}.LayoutName", names)
    yield
    sys.modules.pop("crevnet.data.files.layout_radar", None)


@pytest.fixture
def radar(points, tmp_path):
    """Two days to train on and one to validate on."""
    root = tmp_path / "radar"
    for split, date in (("training", "20240101"), ("training", "20240102"), ("validation", "20240103")):
        (root / split).mkdir(parents=True, exist_ok=True)
        with h5py.File(root / split / f"{date}.h5", "w") as file:
            file["frames"] = points(int(date))
    return root


def test_its_files_are_found_and_recognized(radar):
    days = open_days(radar, layout=layout_named("radar"))
    assert [(day.city, day.date) for day in days] == [("radar", "20240101"), ("radar", "20240102")]
    assert type(layout_of(days[0].path)).__name__ == "Radar"
    assert type(layout_of(radar / "20240101_100m_bins.h5")).__name__ == "Traffic4cast2019"
    assert type(layout_of(radar / "clip.h5")).__name__ == "Movies"


def test_it_is_trained_on_and_scored(radar, crevnet, small, tmp_path):
    once = ("--training.epochs=1", "--training.batches=1", "--model.static=[]", "--data.protocol=radar")
    crevnet("fit", *small, *once, "--data.root", radar, "--out", tmp_path / "run")
    assert "CrevNet" in crevnet("evaluate", tmp_path / "run")
