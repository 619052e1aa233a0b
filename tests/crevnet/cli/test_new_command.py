"""The command that CONTRIBUTING.md adds: one file and one line."""

import re
import sys
from pathlib import Path

import pytest

from crevnet.cli import commands

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").partition("## Add a command")[2].partition("\n## ")[0]
    file = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    name, text = re.search(r'`"(.*?)": "(.*?)",`', section).groups()
    (tmp_path / "data_days.py").write_text(file)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(commands.COMMANDS, name, text)
    yield
    sys.modules.pop("crevnet.cli.commands.data_days", None)


def test_it_runs(example, crevnet, cities):
    assert crevnet("data", "days", cities) == "Here: 2 days\nThere: 1 days\n"
    assert crevnet("data", "days", cities, "--split=validation") == "Here: 1 days\nThere: 1 days\n"


def test_it_has_help(example, crevnet):
    assert "data days           Print the number of days of each city\n" in crevnet("--help")
    text = crevnet("data", "days", "--help")
    assert (
        "Usage: crevnet data days ROOT [OPTIONS]\n\nPrint the number of days that each city has in a folder.\n" in text
    )
    assert "  --split NAME                Name of the folders of days within each city\n" in text


def test_its_errors_are_those_of_all_commands(example, failing, tmp_path):
    assert failing("data", "days") == "crevnet: ROOT is missing (see crevnet data days --help)"
    assert "did you mean --split?" in failing("data", "days", tmp_path, "--slit", "test")
