"""bench/capacity.py: the batch that it finds against the peaks that bench/memory.py predicts, and what it counts by hand."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import capacity
import memory
from crevnet import PRESETS
from kit import rates
from kit.schedules import Training

CPU = torch.device("cpu")
STEPS, HEIGHT, WIDTH = 2, 24, 20


def training(schedule="reversible", batch=1):
    return Training("tiny", schedule, "32-true", batch, STEPS, HEIGHT, WIDTH, CPU)


def peak(schedule, batch):
    return memory.tracked(training(schedule, batch)).peak


@pytest.fixture
def rows(monkeypatch, tmp_path, capsys):
    def call(*options):
        out = tmp_path / "rows.json"
        size = ["--preset", "tiny", "--steps", str(STEPS), "--height", str(HEIGHT), "--width", str(WIDTH)]
        monkeypatch.setattr(sys, "argv", ["capacity.py", *size, *options, "--json", str(out)])
        capacity.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return call


def test_the_batch_is_the_largest_that_fits(rows):
    limit = peak("reversible", 5) + 1
    (row,), text = rows("--schedule", "reversible", "--capacity", str(limit / 2**30))
    assert (row["batch"], row["peak"]) == (5, limit - 1) and peak("reversible", 6) > limit
    assert row["sequences_a_second"] is None and row["how"] == "predicted" and "predicted" in text


def test_the_largest_batch_is_trained_where_its_time_is_asked_for(rows, monkeypatch):
    batches, clock, loss = [], iter(range(0, 1000, 5)), Training.loss

    def seconds(step, device):
        step(lambda: None)
        return next(clock), 5

    def seen(self, network, inputs):
        batches.append(len(inputs[0]))
        return loss(self, network, inputs)

    monkeypatch.setattr(rates, "seconds", seconds)
    monkeypatch.setattr(Training, "loss", seen)
    limit = peak("reversible", 3) + 1
    (row,), text = rows("--schedule", "reversible", "--capacity", str(limit / 2**30), "--time", "--rounds", "3")
    assert batches[-4:] == [3] * 4  # the first is not counted: then 10, 15 and 20 seconds a step of 3 sequences
    assert row["batch"] == 3 and row["sequences_a_second"] == 3 / 15 and row["throughput"] is None
    assert "0.2" in text


def test_baselines_have_a_batch_too(rows):
    found, _ = rows(
        "--only", "convlstm", "unet", "--schedule", "plain", "reversible", "--height", "32", "--width", "32"
    )
    assert [(row["model"], row["schedule"], row["patch"], row["capacity"]) for row in found] == [
        ("convlstm", "plain", 4, 16), ("convlstm", "plain", 4, 32), ("unet", "plain", 1, 16), ("unet", "plain", 1, 32),
    ]  # fmt: skip
    small, large = (replace(training("plain", row["batch"]), model="unet", height=32, width=32) for row in found[2:])
    for limit, its in ((16, small), (32, large)):
        peaks = [memory.predicted(its, [its.batch + more])[0].peak for more in (0, 1)]
        assert peaks[0] <= limit * 2**30 < peaks[1]


def test_nothing_fits_into_nothing(rows):
    (row,), _ = rows("--schedule", "plain", "--capacity", "0.001")
    assert (row["batch"], row["peak"]) == (0, None)


@pytest.mark.parametrize("truth", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("guess", [1, 2, 16, 40])
def test_the_search_ends_at_the_truth_from_any_guess(truth, guess):
    assert capacity.largest(lambda batch: batch <= truth, lambda: guess) == truth


def test_out_of_memory_is_a_result():
    def step():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert capacity.runs_out(step) and not capacity.runs_out(lambda: 1)
    with pytest.raises(ValueError):
        capacity.runs_out(lambda: int("x"))


def test_operations_are_those_of_the_convolutions():
    """Counted by hand: 2 · 9 · inputs · outputs a pixel of a 3x3 convolution; forward once, backward twice."""
    config = PRESETS["tiny"]
    pixels = (HEIGHT // 2) * (WIDTH // 2)

    def residual(width, stride):
        out = width * stride**2
        inner = max(out // config.bottleneck, 1)
        return 2 * 9 * (width * inner + inner * inner + inner * out) * pixels // stride**2

    first, second = residual(8, 1), residual(8, 2)
    n, cells = config.widths[-1], pixels // 4
    module = 2 * cells * (9 * 3 * n * 3 * n * 2 + 9 * 4 * n * n + 2 * n * n + n * n + 9 * n * n + n * n)
    # Each step encodes, predicts and decodes; decoding runs the same residual functions.
    assert rates.operations_per_sequence(training()) == 3 * STEPS * (2 * (first + second) + config.modules * module)


@pytest.mark.parametrize(
    "options",
    [
        ["--capacity", "0"],
        ["--steps", "0"],
        ["--schedule", "none"],
        ["--json", "/no/x.json"],
        ["--schedule", "reversible", "--only", "unet"],
    ],
)
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["capacity.py", *options])
    with pytest.raises(SystemExit) as error:
        capacity.main()
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
