"""bench/stages.py: its predictions against real steps, and the gradients of each way, at toy size."""

import csv
import sys

import pytest
import torch

import revflow
import stages
from kit import staged

TINY = {
    "resnet": stages.Network("ResNet", lambda way: staged.resnet((3, 1, 2), way, width=8), (3, 32, 32), 2),
    "segresnet": stages.Network("SegResNet", lambda way: staged.SegResNet((1, 2, 1), way, 8), (4, 8, 8, 16), 2),
    "llama": stages.Network("Llama", lambda way: staged.llama(2, 256, way), (16, 256), 2),
}
networks = pytest.mark.parametrize("network", TINY.values(), ids=TINY)


@networks
def test_predicted_peaks_are_those_of_real_steps(network):
    for row in stages.measure(network):
        assert (
            row.peak + 2 * row.parameters == revflow.measure_memory(lambda w=row.way: stages.step(network, w, 2)).peak
        )


def gradients(network, way):
    torch.manual_seed(0)
    net = network.make(way).double()
    x = torch.randn(2, *network.sample, dtype=torch.float64)
    return torch.autograd.grad(net(x).square().mean(), [*net.parameters()])


@networks
def test_checkpointing_changes_no_gradient(network):
    plain, checkpoint = gradients(network, "plain"), gradients(network, "checkpoint")
    assert all(torch.equal(found, expected) for found, expected in zip(checkpoint, plain, strict=True))


def test_mixed_is_reversible_with_checkpoints():
    """In a network whose stages have several blocks each; a single block is a residual block."""
    network = stages.Network("ResNet", lambda way: staged.resnet((3, 4), way, width=8), (3, 32, 32), 2)
    reversible, mixed = gradients(network, "reversible"), gradients(network, "mixed")
    assert all(torch.allclose(f, e, rtol=1e-8) for f, e in zip(mixed, reversible, strict=True))


def test_the_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(stages, "NETWORKS", TINY)
    files = {suffix: tmp_path / f"stages.{suffix}" for suffix in ("csv", "md")}
    options = ["--only", "resnet", "llama", "--batch", "64", "--csv", str(files["csv"]), "--markdown", str(files["md"])]
    monkeypatch.setattr(sys, "argv", ["stages.py", *options])
    stages.main()
    with files["csv"].open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["network"], row["way"], row["batch"]) for row in rows] == [
        (name, way, "64") for name in ("ResNet", "Llama") for way in stages.WAYS
    ]
    peaks = {(row["network"], row["way"]): int(row["peak"]) for row in rows}
    for name in ("ResNet", "Llama"):
        assert peaks[name, "mixed"] <= peaks[name, "reversible"] < peaks[name, "plain"]
        assert peaks[name, "checkpoint"] < peaks[name, "plain"]
    assert "| ResNet | 3 x 32 x 32 | 64 |" in files["md"].read_text() and "Llama" in capsys.readouterr().out
