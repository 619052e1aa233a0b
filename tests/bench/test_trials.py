"""bench/kit/trials.py and methods.py: gradients and evaluations of every method, and times by a clock of the test."""

import shutil
import sys
import time
from functools import cache, partial
from types import ModuleType

import pytest
import torch
from torch import nn

import revflow
from kit import libraries, methods, networks, time_row, trials

CPU = torch.device("cpu")
NETWORKS = {
    "tiny": partial(networks.tiny, batch=4, blocks=6),
    "convolutions": partial(networks.convolutions, batch=2, size=4, blocks=10),
    "transformer": partial(networks.transformer, batch=2, tokens=4, layers=5),
    "autoencoder": partial(networks.autoencoder, batch=2, frame=16),
}
METHODS = [
    methods.plain(),
    *map(methods.checkpointed, (1, 2, 4, None)),
    methods.selective(),
    *libraries.libraries(),
    methods.reversible("min"),
    methods.reversible("guard off", guard="off"),
    methods.reversible("2 chunks", chunks=2),
    methods.reversible("some", 200_000),
    methods.reversible("max", "max"),
]
# Of each of the ten convolutions' conditioners: all run again but those of the last group.
EVALUATIONS = {
    "plain": 1,
    "checkpoint every 1": 1.9,
    "checkpoint every 2": 1.8,
    "checkpoint every 4": 1.8,  # groups of 4, 4 and 2
    "checkpoint every sqrt(L)": 1.9,  # of 3, 3, 3 and 1
    "selective every 1": 1.9,
    "memcnn per block": 3,  # once more for the inverse
    "revtorch per stage": 2,
    "revlib per stage": 2,
    "revflow min": 2,
    "revflow guard off": 2,
    "revflow 2 chunks": 2,
    "revflow max": 1,
}
THREE_LIBRARIES = {"memcnn", "revtorch", "revlib"}


def label(method):
    return f"{method.name} {method.setting}".strip()


def named(name):
    return next(m for m in METHODS if m.name == name)


@cache
def twin(name):
    network = NETWORKS[name]().to(torch.float64)
    return network, trials.proof(METHODS[0].of(network), network)


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_computes_the_same(name, method):
    if method.name in libraries.PEERS:
        pytest.importorskip(method.name)
    network, plain = twin(name)
    assert all(e.abs().max() > 0 for e in plain.results)
    proof = trials.proof(method.of(network), network)
    assert trials.difference(proof.results, plain.results) < trials.TOLERANCE
    assert proof.unrestored < trials.TOLERANCE
    if name == "convolutions":
        assert proof.evaluations == pytest.approx(EVALUATIONS.get(label(method), proof.evaluations))
        assert 1 <= proof.evaluations <= 3


def test_inverses_of_revflow_and_memcnn():
    pytest.importorskip("memcnn")
    pytest.importorskip("revtorch")
    pytest.importorskip("revlib")
    network, _ = twin("autoencoder")
    assert {m.name for m in METHODS if m.of(network).inverse} == {"revflow", "memcnn"}


def attempt(method, blocks=4):
    network, other = (networks.convolutions(size=4, blocks=blocks).to(d) for d in (torch.float32, torch.float64))
    return trials.attempt(method, network, other, trials.proof(METHODS[0].of(other), other).results, CPU)


@pytest.mark.parametrize("peer", libraries.PEERS)
def test_a_missing_peer_is_a_row(monkeypatch, peer):
    monkeypatch.setitem(sys.modules, peer, None)
    found = attempt(named(peer))
    assert found.step is None and found.note.startswith("not installed")
    row = found.row([])
    assert row.peak is None and row.time_ratio is None and row.note == found.note


def library(sequential):
    stand_in = ModuleType("revlib")
    stand_in.ReversibleSequential = sequential
    return stand_in


def test_a_peer_that_fails_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "revlib", library(lambda *_, **__: 1 / 0))
    assert attempt(named("revlib")).note == "ZeroDivisionError: division by zero"


def test_a_peer_that_computes_something_else_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "revlib", library(lambda *_, **__: nn.Identity()))
    assert "differ" in attempt(named("revlib")).note


def test_wrong_gradients_of_revflow_are_an_error():
    wrong = methods.Method("revflow", "", lambda network: methods.Passes(lambda x: 2 * x))
    with pytest.raises(AssertionError, match="gradients differ"):
        attempt(wrong)


def test_a_wrong_inverse_is_an_error():
    def of(network):
        forward, inverse = named("revflow").of(network)
        return methods.Passes(forward, lambda y: tuple(1.001 * stream for stream in inverse(y)))

    with pytest.raises(AssertionError, match="its inverse misses the input by 1e-03"):
        attempt(methods.Method("revflow", "", of))


def test_a_network_that_does_not_fit_is_a_row():
    assert "standard autograd" in attempt(methods.checkpointed(4)).note
    pytest.importorskip("revtorch")
    assert attempt(named("revtorch"), blocks=3).note == "its blocks take two conditioners, and this stage has 3"


@pytest.mark.parametrize("name", ["memcnn", "revtorch", "revlib", "revflow"])
def test_reversible_networks_hold_the_same_at_any_depth(name):
    if name in libraries.PEERS:
        pytest.importorskip(name)
    shallow, deep = (peak(named(name), networks.convolutions(size=16, blocks=n)) for n in (4, 12))
    stream = 64 * 16 * 16 * 4
    assert abs(deep - shallow) < stream / 2


def peak(method, network):
    forward = method.of(network.to(torch.float32)).forward
    network.step(forward)
    return revflow.measure_memory(lambda: network.step(forward)).peak


class Machine:
    """A clock, and steps that take their time by it, on a machine that gets slower with every second step."""

    def __init__(self, monkeypatch):
        self.now, self.steps = 0.0, 0
        monkeypatch.setattr(time, "process_time", lambda: self.now)

    def step(self, first, second):
        def run(between):
            self.steps += 1
            self.work(first)
            between()
            self.work(second)

        return run

    def inverse(self, copy, undo):
        def run(between):
            self.work(copy)
            between()
            self.work(undo)

        return run

    def work(self, seconds):
        self.now += seconds * (1 + (self.steps - 1) // 2)


def test_parts_of_a_step():
    network = networks.tiny(2, blocks=2).to(torch.float32)
    seen = []
    network.step(lambda x: (seen.append("forward"), x)[1], lambda: seen.append(network.leaf.grad.norm().item()))
    assert seen == ["forward", 0] and network.leaf.grad.norm() > 0


def test_parts_are_timed_beside_plain(monkeypatch):
    machine = Machine(monkeypatch)
    memory = revflow.MemoryReport(7, 0, "tracked")
    tried = [
        trials.Trial("net", "small", "plain", step=machine.step(1, 3), memory=memory, evaluations=1),
        trials.Trial("net", "small", "absent", note="not installed"),
        trials.Trial("net", "small", "other", "slow", machine.step(2, 5), machine.inverse(9, 1), memory, evaluations=2),
    ]
    plain, absent, other = trials.compare(tried, 3, CPU)
    assert (plain.time_ratio, plain.forward, plain.backward, plain.inverse) == (1, 0.25, 0.75, None)
    assert absent == time_row.Row("net", "small", "absent", note="not installed")
    assert (other.time_ratio, other.quartiles, other.error) == (1.75, (1.75, 1.75), 0)
    assert (other.forward, other.backward, other.inverse) == (0.5, 1.25, 0.25)
    assert (other.evaluations, other.peak, other.how, other.label) == (2, 7, "tracked", "other slow")
    assert machine.steps == 3 * 4  # each beside plain, plain too


def test_medians_and_their_spread():
    trial = trials.Trial(
        "net", "small", "other", step=print, memory=revflow.MemoryReport(1, 0, "tracked"), evaluations=1
    )
    row = trial.row([trials.Lap(2, forward, 2, None) for forward in (0, 1, 2, 4, 8)])
    assert (row.time_ratio, row.quartiles, row.forward, row.backward, row.seconds) == (2, (1.25, 4), 1, 1, 4)
    assert row.error == pytest.approx(1.2533 * 1.5811 / 5**0.5, rel=1e-4)


def test_the_inputs_of_checkpoints_are_offloaded_and_nothing_else():
    """By stand-ins for the host's memory: two streams of each coupling but the last, whose activations stay."""
    network, plain = twin("convolutions")
    away = []

    def leave(tensor):
        away.append(tensor.clone())
        return len(away) - 1

    def elsewhere():
        return torch.autograd.graph.saved_tensors_hooks(leave, lambda number: away[number])

    passes = methods._checkpoint(network, 1, boundaries=elsewhere)
    network.to(torch.float64)
    loss = network.step(passes.forward)
    gradients = [parameter.grad for parameter in network.parameters]
    assert trials.difference([loss, *gradients], plain.results) < trials.TOLERANCE
    assert len(away) == 2 * (len(network.conditioners) - 1)
    assert {tensor.shape for tensor in away} == {(2, 64, 4, 4)}
    loss = network.to(torch.float64).step(methods.offloaded().of(network).forward)
    gradients = [parameter.grad for parameter in network.parameters]
    assert trials.difference([loss, *gradients], plain.results) < trials.TOLERANCE


@pytest.mark.parametrize("may_fail", [False, True])
def test_a_method_that_fails_is_a_row_if_it_may(may_fail):
    def fail(network):
        raise RuntimeError("no compiler\nat all")

    method = methods.Method("checkpoint", "compiled", fail, may_fail)
    tried = trials.attempt_all([method], NETWORKS["tiny"], CPU)
    if may_fail:
        assert [trial.note for trial in tried] == ["", "RuntimeError: no compiler"]
    else:
        with pytest.raises(RuntimeError, match="no compiler"):
            list(tried)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiled_checkpoints_compute_the_same():
    network, plain = twin("transformer")
    found = trials.proof(methods.compiled().of(network), network)
    assert trials.difference(found.results, plain.results) < trials.TOLERANCE
