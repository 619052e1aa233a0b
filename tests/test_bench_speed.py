"""bench/speed.py: what it counts, by hand, and what it writes. Its times are not looked at."""

import json
import sys

import pytest

import speed

EVALUATIONS = {
    "plain": 1,
    "checkpoint": 2,
    "reversible": 2,
    "reversible-bfloat16": 2,
    "reversible-offloaded": 2,
    "reversible-every-3": 2 + 4 / 6,  # of each three steps two are computed once more
}


def test_rows(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    size = ["--height", "16", "--width", "12", "--steps", "6", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *size, "--json", str(out)])
    speed.main()
    rows = {row["method"]: row for row in json.loads(out.read_text())}
    assert {name: row["evaluations"] for name, row in rows.items()} == pytest.approx(EVALUATIONS)
    assert rows["plain"]["time_ratio"] == 1 and rows["plain"]["quartiles"] == [1, 1]
    assert rows["reversible"]["peak"] < rows["plain"]["peak"]
    text = capsys.readouterr().out
    assert all(name in text for name in EVALUATIONS)


@pytest.mark.parametrize("options", [["--rounds", "1"], ["--steps", "0"], ["--schedule", "none"], ["--json", "/no/x"]])
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    with pytest.raises(SystemExit) as error:
        speed.main()
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
