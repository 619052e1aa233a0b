"""bench/budget.py: what is written, and the points that revflow does not match, by hand."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

import budget
from kit import libraries, networks, operations, trials
from kit.budgets import Budgets
from kit.methods import planned, reversible
from pages import budget_figure


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
    assert peaks["checkpoint every 1, offloaded"] == peaks["checkpoint every 1"]  # it is on a CPU
    own = {name.removeprefix("revflow as "): peak for name, peak in peaks.items() if name.startswith("revflow as ")}
    others = [name for name, peak in peaks.items() if peak and not name.startswith("revflow")]
    assert own.keys() == {*others} - {"checkpoint every 1, offloaded"}
    assert all(peak <= peaks[name] for name, peak in own.items())
    assert own["plain"] > 0.99 * peaks["plain"]
    convolutions = {f"{row['method']} {row['setting']}".strip(): row["convolutions"] for row in rows}
    assert (convolutions["plain"], convolutions["checkpoint every 1"], convolutions["revflow min"]) == (20, 29, 40)
    parts = [f"{i}/{budget.PARTS}" for i in range(1, budget.PARTS)]
    budgets = [peaks[f"revflow {part}"] for part in ("min", *parts, "max")]
    assert all(a < 1.01 * b for a, b in pairwise(budgets)) and len(set(budgets)) > 4  # but for the guard's values
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
    replace(row("plain", "", 100 << 20, 1.0), convolutions=64, flops=10**9),
    row("checkpoint", "every 1", 30 << 20, 1.3),
    replace(
        row("checkpoint", "every 2", 29 << 20, 1.2), convolutions=95, flops=1160 * 10**6, calls=1765, how="tracked"
    ),
    row("checkpoint", "every 1, offloaded", 30 << 20, 1.1),
    row("selective", "every 1", 60 << 20, 1.25),
    row("revlib", "", 10 << 20, 2.0),  # less memory than revflow's "min"
    row("memcnn", "", None, None),
    row("revflow", "min", 20 << 20, 1.39),
    row("revflow", "as plain", 99 << 20, 0.99),
    row("revflow", "as checkpoint every 1", 30 << 20, 1.305),
    replace(
        row("revflow", "as checkpoint every 2", 28 << 20, 1.22),
        convolutions=98,
        flops=1177 * 10**6,
        products=0,
        calls=2253,
    ),
    row("revflow", "as selective every 1", 59 << 20, 1.3),
]


def test_points_are_compared_with_their_own_rows():
    found = budget.points(ROWS)
    assert [(point.other, point.own) for point in found] == [
        (ROWS[0], ROWS[8]),
        (ROWS[1], ROWS[9]),
        (ROWS[2], ROWS[10]),
        (ROWS[4], ROWS[11]),
        (ROWS[5], None),
    ]
    assert [round(point.gap, 3) for point in found] == [-0.01, 0.005, 0.02, 0.05, float("inf")]


def test_the_verdict():
    assert budget.verdict(ROWS).splitlines() == [
        "net: with the memory of another method, revflow takes at most 0.01 of standard autograd's time more than that method at "
        "2 of 5 points.",
        "- plain, 100.0 MiB, takes 1.00: revflow takes 0.99 in 99.0 MiB, 0.010 ± 0.050 less",
        "- checkpoint every 1, 30.0 MiB, takes 1.30: revflow takes 1.30 in 30.0 MiB, 0.005 ± 0.050 more",
        "- checkpoint every 2, 29.0 MiB, takes 1.20: revflow takes 1.22 in 28.0 MiB, 0.020 ± 0.050 more. Per step, it runs 98 "
        "convolutions, compared with 95; 1,177 million floating-point operations, compared with 1,160; 2,253 calls of operators, "
        "compared with 1,765",
        "- selective every 1, 60.0 MiB, takes 1.25: revflow takes 1.30 in 59.0 MiB, 0.050 ± 0.050 more. Its operations are not "
        "counted",
        "- revlib, 10.0 MiB, takes 2.00: revflow needs more memory",
    ]


def test_offloaded_checkpoints_are_compared_on_a_gpu():
    rows = [replace(ROWS[0], how="cuda"), replace(ROWS[3], how="cuda")]
    assert [point.other for point in budget.points(rows)] == rows
    assert [point.other for point in budget.points([replace(r, how="tracked") for r in rows])] == [
        replace(ROWS[0], how="tracked")
    ]


def test_the_largest_budget_within_a_limit():
    network = networks.convolutions(2, 8, blocks=6).to(torch.float32)
    budgets = Budgets(network, torch.device("cpu"))
    assert budgets.distinct == sorted({*budgets.distinct}) and len(budgets.distinct) > 5
    low, high = budgets.distinct[0], budgets.distinct[-1]
    assert (low, high) == (budgets.part(0, 4), budgets.part(4, 4))
    assert low == planned(network, "min").peak and high == planned(network, 1 << 40).peak
    assert budgets.within(1) is None and budgets.within(1 << 40) == high
    measured = {budgets.within(limit): limit for limit in (700_000, 800_000, 900_000)}
    assert len(measured) == 3
    subject = trials.subject(lambda: networks.convolutions(2, 8, blocks=6), torch.device("cpu"))
    for within, limit in measured.items():
        assert 0.8 * limit < subject.attempt(reversible("", within)).memory.peak <= limit


def test_larger_budgets_may_have_smaller_peaks(monkeypatch):
    budgets = Budgets(networks.tiny(), torch.device("cpu"))
    budgets.distinct = [*range(20)]
    peaks = [100, 101, 110, 120, 130, 125, 122, 119, 140, 150, 160, 170, 180, 190, 185, 200, 210, 220, 230, 225]
    monkeypatch.setattr(budgets, "_measured", peaks.__getitem__)
    assert [budgets.within(limit) for limit in (99, 100, 109, 120, 180, 229)] == [None, 0, 1, 7, 12, 19]


def test_operations_are_counted():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 1, 3, 3)
    assert operations.counted(lambda: x.mm(x.detach().T)) == operations.Operations(0, 1, 2 * 3 * 3 * 4, 3)
    assert operations.counted(lambda: x.mm(torch.ones(4, 4)).sum().backward()).products == 2
    image = torch.randn(1, 1, 8, 8, requires_grad=True)
    both = operations.counted(lambda: torch.nn.functional.conv2d(image, w).sum().backward())
    assert both[:3] == (1, 0, 2 * 2 * (2 * 9 * 6 * 6))
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    attention = operations.counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert attention.flops == (2 + 5) * 2 * 8 * 8 * 4  # products: two, and five in the backward pass


def test_chunks_are_not_in_the_figure():
    rows = [row("plain", "", 100 << 20, 1.0), row("revflow", "min", 20, 1.4), row("revflow", "min, 4 chunks", 10, 3.0)]
    (panel,) = budget_figure.draw(rows).axes[:1]
    drawn = {tuple(point) for line in panel.lines for point in line.get_xydata()}
    assert drawn == {(100, 1.0), (20 / 2**20, 1.4)}
    assert {text.get_text() for text in panel.texts} == {"standard autograd", "revflow"}


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
