"""bench/speed.py: what is run, what is written, and evaluations, by hand. Its times are not looked at."""

import json
import sys
from functools import partial

import pytest
import torch

import speed
from crevnet import CrevNet
from kit import crevnet_trials, libraries, networks, precisions, time_row, trials

CPU = torch.device("cpu")
# Of a conditioner, where the last of so many groups is not checkpointed and every other conditioner runs again.
CHAIN = {
    "plain": 1,
    "checkpoint every 1": 7 / 4,  # four groups of one
    "checkpoint every sqrt(L)": 6 / 4,  # two groups of two
    "revflow min": 2,
    "revflow min, guard off": 2,
    "revflow max": 1,
}
CREVNET = {
    "plain": 1,
    "checkpoint": 2,
    "reversible-autoencoder": 1,
    "reversible": 2,
    "reversible-bfloat16": 2,
    "reversible-offloaded": 2,
    "reversible-every-3": 2 + 2 / 3,  # of each three steps two are computed once more
}
NAMES = {"tiny": CHAIN, "convolutions": CHAIN, "transformer": CHAIN, "crevnet-tiny": CREVNET}
SMALL = ["--batch", "2", "--rounds", "2", "--image", "4", "--tokens", "4", "--height", "16", "--width", "12"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Small networks, and no libraries: what they compute is looked at in test_trials.py."""
    for peer in libraries.PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    for name, size in (("tiny", {"blocks": 4}), ("convolutions", {"blocks": 4}), ("transformer", {"layers": 2})):
        monkeypatch.setattr(networks, name, partial(getattr(networks, name), **size))

    def call(*options):
        out = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["speed.py", *SMALL, *options, "--json", str(out)])
        speed.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return call


def label(row):
    return f"{row['method']} {row['setting']}".strip()


def test_rows(run, tmp_path):
    figure, markdown = tmp_path / "speed.png", tmp_path / "speed.md"
    rows, text = run("--steps", "3", "--figure", str(figure), "--markdown", str(markdown))
    page = markdown.read_text()
    assert list(dict.fromkeys(row["network"] for row in rows)) == list(NAMES)
    for network, evaluations in NAMES.items():
        found = [row for row in rows if row["network"] == network]
        timed = {label(row): row for row in found if not row["note"]}
        assert {name: row["evaluations"] for name, row in timed.items()} == pytest.approx(evaluations)
        for row in timed.values():
            assert row["forward"] > 0 and row["backward"] > 0 and row["error"] >= 0 and row["how"] == "tracked"
            assert (row["inverse"] is not None) == (row["method"] == "revflow")
            assert (row["precision"], row["compiled"], row["throughput"]) == ("32-true", False, None)
            assert f"| {row['method']} | {row['setting']} | {row['time_ratio']:.2f} | ± {row['error']:.2f}" in page
        missing = [row for row in found if row["note"]]
        assert [row["method"] for row in missing] == list(libraries.PEERS)
        assert all(row["time_ratio"] is None and row["note"] in text and row["note"] in page for row in missing)
    peaks = {(row["network"], label(row)): row["peak"] for row in rows}
    assert peaks["transformer", "checkpoint every 1"] < peaks["transformer", "plain"]
    assert peaks["crevnet-tiny", "reversible"] < peaks["crevnet-tiny", "plain"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_crevnet_alone(run):
    rows, text = run("--only", "crevnet", "--steps", "1", "--schedule", "reversible", "--precision", "bf16-mixed")
    assert [row["method"] for row in rows] == ["plain", "reversible", *libraries.PEERS]
    assert {row["precision"] for row in rows} == {"bf16-mixed"} and "bf16-mixed" in text


def test_parts_of_a_step_of_crevnet(monkeypatch):
    training = crevnet_trials.Training("tiny", "plain", "32-true", 1, 1, 16, 12, CPU)
    network, inputs = training.trainee()
    loss, seen = network.loss, []
    network.loss = lambda *given: (seen.append(torch.is_autocast_enabled("cpu")), loss(*given))[1]
    monkeypatch.setattr(crevnet_trials.Training, "trainee", lambda _: (network, inputs))
    crevnet_trials.training_step(training, "bf16-mixed")(
        lambda: seen.append([p for p in network.parameters() if p.grad is not None])
    )
    assert seen == [True, []] and all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("method", speed.METHODS, ids=lambda m: f"{m.name} {m.setting}")
def test_every_evaluation_is_under_autocast_and_compiled(monkeypatch, method):
    """The reruns of libraries too, which leave autocast behind in their backward pass."""
    if method.name in libraries.PEERS:
        pytest.importorskip(method.name)
    compiled, dtypes = [], set()

    def stand_in(function):
        def call(x):
            compiled.append(x)
            return function(x)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    network, twin = (networks.tiny(2, blocks=4).to(dtype) for dtype in (torch.float32, torch.float64))
    precisions.prepared(network, "bf16-mixed", True, CPU)
    for conditioner in network.conditioners:
        conditioner[2].register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    network.step(method.of(network).forward)
    assert dtypes == {torch.bfloat16}
    assert len(compiled) == 4 * trials.proof(method.of(twin), twin).evaluations


def test_compiled_crevnet(monkeypatch, run):
    compiled = []
    monkeypatch.setattr(CrevNet, "compile_parts", lambda network: compiled.append(network))
    rows, text = run("--only", "crevnet", "--steps", "1", "--schedule", "checkpoint", "reversible", "--compile")
    assert len(compiled) == 4  # plain and reversible, to be measured and to be timed
    assert {row["method"]: row["note"] for row in rows}[
        "checkpoint"
    ] == "compiling its parts would disable their checkpoints"
    assert all(row["compiled"] for row in rows) and "32-true, compiled" in text


def test_crevnet_in_the_layout_of_tensor_cores(run):
    size = crevnet_trials.Prepared("tiny", "plain", "32-true", 1, 1, 32, 32, CPU, channels_last=True)
    network, _ = size.trainee()
    weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    rows, text = run("--only", "crevnet", "--steps", "1", "--schedule", "reversible", "--channels-last")
    assert all(row["channels_last"] for row in rows) and "32-true, channels last" in text


def test_useful_operations():
    """Of eight layers of a multiplication and an addition for each of 8 x 8 weights and 2 rows; backward twice as many."""
    assert speed.operations_of(lambda: networks.tiny(2, blocks=4)) == 3 * 8 * 2 * 8 * 8 * 2
    timed, absent = time_row.Row("net", "", "plain", seconds=2.0), time_row.Row("net", "", "memcnn")
    assert [row.throughput for row in speed.shares([timed, absent], useful=6.0, rate=12.0)] == [0.25, None]


@pytest.mark.parametrize(
    "options",
    [
        ["--rounds", "1"],
        ["--batch", "0"],
        ["--steps", "0"],
        ["--image", "x"],
        ["--schedule", "none"],
        ["--only", "none"],
        ["--precision", "tf32"],
        ["--precision", "64-true"],
        ["--json", "/no/x"],
        ["--markdown", "/no/x"],
        ["--figure", "x.gif"],
    ],
)
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    with pytest.raises(SystemExit) as error:
        speed.main()
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
