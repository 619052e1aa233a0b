"""bench/budget.py: every method's gradients, what is written, and the points that revflow does not match, by hand."""

import json
import sys
from functools import cache, partial
from types import ModuleType

import pytest
import torch

import budget
import methods
import networks
import revflow

CPU = torch.device("cpu")
NETWORKS = {
    "convolutions": lambda: networks.convolutions(batch=2, size=4, blocks=10),
    "transformer": lambda: networks.transformer(batch=2, tokens=4, layers=5),
    "autoencoder": lambda: networks.autoencoder(batch=2, size=16),
}
METHODS = [
    *methods.others(),
    methods.reversible("none"),
    methods.reversible("none, 2 chunks", chunks=2),
    methods.reversible("some", 300_000),
    methods.reversible("all", "all"),
]


@cache
def expectation(name):
    network = NETWORKS[name]()
    return network, budget.gradients(METHODS[0], network)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {m.setting}".strip())
@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_computes_the_same(name, method):
    if method.name in methods.PEERS:
        pytest.importorskip(method.name)
    network, expected = expectation(name)
    assert all(e.abs().max() > 0 for e in expected)
    assert budget.difference(budget.gradients(method, network), expected) < budget.TOLERANCE
    assert network.leaf.dtype == torch.float32


def trial(method):
    network = networks.convolutions(size=4, blocks=4)
    return budget.attempt(method, network, budget.gradients(METHODS[0], network), CPU)


def named(name):
    return next(m for m in METHODS if m.name == name)


@pytest.mark.parametrize("peer", methods.PEERS)
def test_a_missing_peer_is_a_row(monkeypatch, peer):
    monkeypatch.setitem(sys.modules, peer, None)
    found = trial(named(peer))
    assert found.step is None and found.note.startswith("not installed")
    row = found.row(networks.convolutions(size=4, blocks=4), [])
    assert row.peak is None and row.time_ratio is None and row.note == found.note


def test_a_peer_that_fails_is_a_row(monkeypatch):
    broken = ModuleType("revlib")
    broken.ReversibleSequential = lambda *_, **__: 1 / 0
    monkeypatch.setitem(sys.modules, "revlib", broken)
    assert trial(named("revlib")).note == "ZeroDivisionError: division by zero"


def test_a_peer_that_computes_something_else_is_a_row(monkeypatch):
    other = ModuleType("revlib")
    other.ReversibleSequential = lambda *_, **__: torch.nn.Identity()
    monkeypatch.setitem(sys.modules, "revlib", other)
    assert "differ" in trial(named("revlib")).note


def test_wrong_gradients_of_revflow_are_an_error():
    with pytest.raises(AssertionError, match="differ"):
        trial(methods.Method("revflow", "", lambda network: lambda x: 2 * x))


def test_a_network_that_does_not_fit_is_a_row():
    assert "ordinary autograd" in trial(methods.others()[3]).note  # every 4 of 4 blocks
    pytest.importorskip("revtorch")
    three = networks.convolutions(size=4, blocks=3)
    found = budget.attempt(named("revtorch"), three, budget.gradients(METHODS[0], three), CPU)
    assert found.note == "its blocks take two conditioners, and 3 stand together"


@pytest.mark.parametrize("name", ["memcnn", "revtorch", "revlib", "revflow"])
def test_reversible_networks_hold_the_same_at_any_depth(name):
    if name != "revflow":
        pytest.importorskip(name)
    shallow, deep = (peak(named(name), networks.convolutions(size=16, blocks=n)) for n in (4, 12))
    stream = 64 * 16 * 16 * 4
    assert abs(deep - shallow) < stream / 2


def peak(method, network):
    network.to(torch.float32)
    forward = method.of(network)
    network.step(forward)
    return revflow.measure_memory(lambda: network.step(forward)).peak


def test_rows(monkeypatch, tmp_path, capsys):
    for peer in methods.PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    files = {
        kind: tmp_path / f"out.{suffix}" for kind, suffix in (("json", "json"), ("markdown", "md"), ("figure", "png"))
    }
    monkeypatch.setattr(networks, "convolutions", partial(networks.convolutions, blocks=10))
    size = ["--only", "convolutions", "--image", "8", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["budget.py", *size, *(s for k, f in files.items() for s in (f"--{k}", str(f)))])
    budget.main()
    rows = json.loads(files["json"].read_text())
    keys = {"network", "method", "setting", "peak", "time_ratio", "quartiles", "error", "how", "note"}
    assert all(set(row) == keys and row["network"] == "convolutions" for row in rows)
    assert {row["method"] for row in rows if row["note"]} == set(methods.PEERS)
    assert {row["how"] for row in rows if not row["note"]} == {"tracked"}
    peaks = {f"{row['method']} {row['setting']}".strip(): row["peak"] for row in rows}
    assert rows[0]["method"] == "plain" and 0.5 < rows[0]["time_ratio"] < 2  # against itself: the machine's noise
    assert peaks["checkpoint every 1"] < peaks["selective every 1"] < peaks["plain"]
    parts = [f"{i}/{budget.PARTS}" for i in range(1, budget.PARTS)]
    budgets = [peaks[f"revflow {part}"] for part in ("none", *parts, "all")]
    assert budgets[1:] == sorted(budgets[1:]) and len(set(budgets)) > 4
    assert budgets[0] < 1.01 * budgets[1]  # the last block may be kept for nothing
    assert budgets[0] < peaks["checkpoint every 1"] and budgets[-2] < peaks["plain"] == budgets[-1]
    text, markdown = capsys.readouterr().out, files["markdown"].read_text()
    for row in rows:
        assert row["setting"] in text and f"| {row['method']} | {row['setting']} |" in markdown
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


def row(method, setting, peak, time):
    quartiles, error = (None, None) if time is None else ((time, time), 0.03 if method == "revflow" else 0.04)
    return budget.Row("net", method, setting, peak, time, quartiles, error, note="" if peak else "not installed")


ROWS = [
    row("plain", "", 100 << 20, 1.0),
    row("checkpoint", "every 1", 30 << 20, 1.3),  # as 30 MiB of revflow's
    row("checkpoint", "every 2", 29 << 20, 1.4),  # 20 MiB of revflow's take less time
    row("selective", "every 1", 60 << 20, 1.25),  # more memory, less time than any within it
    row("revlib", "", 10 << 20, 2.0),  # less memory than any
    row("memcnn", "", None, None),
    row("revflow", "none", 20 << 20, 1.39),
    row("revflow", "1/2", 30 << 20, 1.3),
    row("revflow", "all", 101 << 20, 0.99),
]


def test_points_that_revflow_does_not_match():
    assert budget.exceptions(ROWS) == [(ROWS[0], ROWS[7]), (ROWS[3], ROWS[7]), (ROWS[4], None)]
    assert budget.verdict(ROWS).splitlines()[1:] == [
        "- plain, 100.0 MiB, takes 1.00: with its memory revflow takes 1.30, 0.30 ± 0.05 more",
        "- selective every 1, 60.0 MiB, takes 1.25: with its memory revflow takes 1.30, 0.05 ± 0.05 more",
        "- revlib, 10.0 MiB, takes 2.00: revflow needs more memory",
    ]


def test_a_curve_that_lies_below_every_point():
    rows = [row("plain", "", 2, 1.0), row("revflow", "all", 2, 1.0)]
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
