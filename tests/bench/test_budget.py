"""bench/budget.py: what is written, and the points that revflow does not match, by hand."""

import json
import sys
from functools import partial

import pytest

import budget
from kit import libraries, networks


def test_rows(monkeypatch, tmp_path, capsys):
    for peer in libraries.PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    files = {
        kind: tmp_path / f"out.{suffix}" for kind, suffix in (("json", "json"), ("markdown", "md"), ("figure", "png"))
    }
    monkeypatch.setattr(networks, "convolutions", partial(networks.convolutions, blocks=10))
    size = ["--only", "convolutions", "--batch", "2", "--image", "8", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["budget.py", *size, *(s for k, f in files.items() for s in (f"--{k}", str(f)))])
    budget.main()
    rows = json.loads(files["json"].read_text())
    assert all(row["network"] == "convolutions" and "10 blocks" in row["size"] for row in rows)
    assert {row["method"] for row in rows if row["note"]} == set(libraries.PEERS)
    assert {row["how"] for row in rows if not row["note"]} == {"tracked"}
    peaks = {f"{row['method']} {row['setting']}".strip(): row["peak"] for row in rows}
    assert rows[0]["method"] == "plain"
    assert peaks["checkpoint every 1"] < peaks["selective every 1"] < peaks["plain"]
    parts = [f"{i}/{budget.PARTS}" for i in range(1, budget.PARTS)]
    budgets = [peaks[f"revflow {part}"] for part in ("min", *parts, "max")]
    assert budgets[1:] == sorted(budgets[1:]) and len(set(budgets)) > 4
    assert budgets[0] < 1.01 * budgets[1]  # the last block may be kept for nothing
    assert budgets[0] < peaks["checkpoint every 1"] and budgets[-2] < peaks["plain"] == budgets[-1]
    text, markdown = capsys.readouterr().out, files["markdown"].read_text()
    for row in rows:
        assert row["setting"] in text and f"| {row['method']} | {row['setting']} |" in markdown
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


def row(method, setting, peak, time):
    if peak is None:
        return budget.Row("net", "small", method, setting, note="not installed")
    error = 0.03 if method == "revflow" else 0.04
    times = {
        "time_ratio": time,
        "quartiles": (time, time),
        "forward": 0.4 * time,
        "backward": 0.6 * time,
        "seconds": 1.0,
    }
    return budget.Row("net", "small", method, setting, peak=peak, error=error, **times)


ROWS = [
    row("plain", "", 100 << 20, 1.0),
    row("checkpoint", "every 1", 30 << 20, 1.3),  # as 30 MiB of revflow's
    row("checkpoint", "every 2", 29 << 20, 1.4),  # 20 MiB of revflow's take less time
    row("selective", "every 1", 60 << 20, 1.25),  # more memory, less time than any within it
    row("revlib", "", 10 << 20, 2.0),  # less memory than any
    row("memcnn", "", None, None),
    row("revflow", "min", 20 << 20, 1.39),
    row("revflow", "1/2", 30 << 20, 1.3),
    row("revflow", "max", 101 << 20, 0.99),
]


def test_points_that_revflow_does_not_match():
    assert budget.exceptions(ROWS) == [(ROWS[0], ROWS[7]), (ROWS[3], ROWS[7]), (ROWS[4], None)]
    assert budget.verdict(ROWS).splitlines()[1:] == [
        "- plain, 100.0 MiB, takes 1.00: with its memory revflow takes 1.30, 0.30 ± 0.05 more",
        "- selective every 1, 60.0 MiB, takes 1.25: with its memory revflow takes 1.30, 0.05 ± 0.05 more",
        "- revlib, 10.0 MiB, takes 2.00: revflow needs more memory",
    ]


def test_a_curve_that_lies_below_every_point():
    rows = [row("plain", "", 2, 1.0), row("revflow", "max", 2, 1.0)]
    assert budget.exceptions(rows) == []
    assert budget.verdict(rows) == (
        "net: for every other point there is one of revflow's that takes no more memory and no more time."
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--rounds", "1"],
        ["--batch", "0"],
        ["--frame", "12"],
        ["--only", "none"],
        ["--json", "/no/x"],
        ["--markdown", "/no/x"],
        ["--figure", "x.gif"],
    ],
)
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["budget.py", *options])
    with pytest.raises(SystemExit) as error:
        budget.main()
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
