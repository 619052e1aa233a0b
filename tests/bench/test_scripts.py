"""The scripts of bench/: the help of each, and the figures of the small ones at toy size, except for times."""

import argparse
import importlib
import json
import re
import shutil
import sys

import pytest
from documents import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if not path.stem.startswith("test_"))
CHAIN = ["--channels", "8", "--size", "8", "--blocks", "2", "--rounds", "2"]


@pytest.fixture
def printed(monkeypatch, capsys):
    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return call


class Parsed(Exception):  # noqa: N818
    """Carries a script's parser out of its `main`."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch):
    """It begins with the script's command, and has a line for each option."""

    def parse(parser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(script).main()
    (parser,) = parsed.value.args
    assert re.search(rf"^    .*(python bench/{script}\.py|make {script})", parser.description, re.MULTILINE)
    without = [action.dest for action in parser._actions if not action.help]
    assert not without


def test_drift(printed, tmp_path):
    picture = tmp_path / "drift.png"
    sizes = ["--depths", "2", "40", "--channels", "2", "--size", "4", "--networks", "1"]
    text = printed("drift", *sizes, "--out", str(picture))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (2|40) ", line)]
    assert [row[0] for row in rows] == ["2", "40"] * 2
    for shallow, deep in (rows[:2], rows[2:]):
        assert shallow[3:] == deep[3:] == ["0", "0"]  # exact arithmetic
        assert 0 < float(shallow[1]) < float(deep[1]) < 1e-5  # float32
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_exact(printed):
    text = printed("exact", *CHAIN, "--batch", "16")
    kept = {
        name: (float(a), float(b))
        for name, a, b in re.findall(r"(\w+): .* stream: ([\d.]+) bytes, exact ([\d.]+)", text)
    }
    guard = kept["additive"][1]
    assert 0 < guard < 0.1 and kept["gated"] == pytest.approx((4, 1 + guard), abs=0.001)


def test_guard(printed):
    assert re.search(r"[+-][\d.]+ % \+- [\d.]+ \(quartiles", printed("guard", *CHAIN))


def test_overhead(printed):
    text = printed("overhead", "--blocks", "2", "--rows", "2", "3", "--rounds", "2")
    found = re.findall(r"batch +(\d+): [\d.]+× standard autograd with the guard off, [\d.]+×", text)
    assert found == ["2", "3"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiled(printed, monkeypatch, tmp_path):
    """The gradients are compared with those of standard autograd, in the script."""
    script = importlib.import_module("compiled")
    some = [c for c in script.CONTENDERS if c.setting in ("", "one graph") and c.method.name != "checkpoint"]
    monkeypatch.setattr(script, "CONTENDERS", some)
    rows, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    text = printed(
        "compiled", "--only", "tiny", "--blocks", "2", "--rounds", "2", "--json", str(rows), "--figure", str(picture)
    )
    found = {(row["method"], row["setting"]): row for row in json.loads(rows.read_text())}
    assert [*found] == [("plain", ""), ("plain", "one graph"), ("revflow", ""), ("revflow", "one graph")]
    # The output is two streams. Each block's standard graph has three streams more: the input of each layer.
    assert found["revflow", "one graph"]["saved_streams"] == 2
    assert found["plain", "one graph"]["saved_streams"] >= 6
    assert "2 blocks, 256 x 8 per stream" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rounding(printed, tmp_path):
    printed("rounding", "--preset", "tiny", "--size", "16", "--windows", "1", "--markdown", str(tmp_path / "page.md"))
    lines = (tmp_path / "page.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| aircraft", "| a ", "| uniform"))]
    assert [row[0] for row in rows] == ["aircraft, from slot 100", "a square in the dark", "uniform noise"]
    for _, _, plain, rebuilt, guard, exact in rows:
        assert 0 < float(plain) < 1e-4 and 0 < float(rebuilt) < 1e-2 and guard in ("silent", "warns")
        assert float(exact) == 0


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("drift", ["--depths", "0"]),
        ("exact", ["--channels", "9"]),
        ("guard", ["--rounds", "1"]),
        ("overhead", ["--rows", "x"]),
    ],
)
def test_wrong_options_end_in_a_line(printed, capsys, script, options):
    with pytest.raises(SystemExit) as error:
        printed(script, *options)
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
