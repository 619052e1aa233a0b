"""Two processes that train together, over gloo: what one process does with batches as large as theirs together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from baseline_nets import TINY, make, window
from processes import at_call, end, kill, killed_in_step, nothing, sent, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crevnet import CrevNet
from crevnet.data.errors import DataError
from crevnet.data.sampling import EpochShuffle, SharedBatchSampler

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

ROOT = Path(__file__).parents[3]
WORLD = 2
ALWAYS = "--training.checkpoint_minutes=1e-9"


def as_torchrun(rank, port, before):
    """The environment that torchrun gives to its processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test", GROUP_RANK="0")
    before()


def together(arguments, said, *before):
    """`crevnet ARGUMENTS` in two processes, after what is to be done before in each. Returns their exit statuses, and keeps
    what each prints in a file of `said`."""
    said.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    befores = before or (nothing,) * WORLD
    processes = [
        start(arguments, said / str(rank), partial(as_torchrun, rank, port, befores[rank])) for rank in range(WORLD)
    ]
    return [end(process) for process in processes]


def errors(said):
    """The lines that say why training has ended, of both processes."""
    text = "".join((said / str(rank)).read_text() for rank in range(WORLD))
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("crevnet: ")]


def checkpoint(folder, which="last"):
    return torch.load(folder / "checkpoints" / f"{which}.ckpt", map_location="cpu", weights_only=True)


def losses(folder):
    """Step -> the value that TensorBoard shows, in float32."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in ("train/loss", "val/mse")}


def state(folder):
    """Weights, and Adam's means of their gradients and of the squares of these."""
    found = checkpoint(folder)
    moments = found["optimizer_states"][0]["state"]
    named = {f"{number}.{name}": m[name] for number, m in moments.items() for name in ("exp_avg", "exp_avg_sq")}
    return {**found["state_dict"], **named}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def options(cities, small):
    """Seven training windows, so that of the second batch of four one process has two and the other one; three validation
    windows likewise. Two epochs of two steps."""
    data = (
        "--data.root",
        cities,
        "--data.cities=[There]",
        "--data.training_slots=[2,13]",
        "--data.validation_slots=[0,15]",
    )
    return (*small, *data, "--training.epochs=2", "--training.learning_rate=1e-3", "--training.precision=64-true")


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    process = start(("fit", *options, "--data.batch_size=4", "--out", folder), folder.with_suffix(".said"))
    assert end(process) == 0, folder.with_suffix(".said").read_text()
    return folder


def no_writing():
    def fail():
        raise AssertionError("this process writes a file")

    at_call(torch, "save", None, fail)
    at_call(os, "replace", None, fail)


@pytest.fixture(scope="module")
def pair(options, tmp_path_factory):
    """The run of two, of which the second one must not write."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    arguments = ("fit", *options, "--data.batch_size=2", "--out", folder)
    assert together(arguments, folder.with_suffix(".said"), nothing, no_writing) == [0, 0]
    assert (folder.with_suffix(".said") / "1").read_text().count("best validation") == 0
    return folder


# --- windows


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("windows", [1, 5, 6, 7, 12])
@pytest.mark.parametrize("size", [1, 2])
def test_processes_share_the_batches_of_one(processes, windows, size, monkeypatch):
    def batches(rank, of, size):
        monkeypatch.setattr("crevnet.data.sampling.place", lambda: (rank, of))
        sampler = SharedBatchSampler(EpochShuffle(windows, seed=3), size, drop_last=False)
        found = list(sampler)
        assert len(found) == len(sampler)
        return [(batch, sampler.part(number)) for number, batch in enumerate(found)]

    whole = batches(0, 1, size * processes)
    assert all(part == (1, len(batch)) for batch, part in whole)
    shares = [batches(rank, processes, size) for rank in range(processes)]
    assert sorted(w for mine in shares for batch, part in mine if part.share for w in batch) == list(range(windows))
    for (batch, _), *parts in zip(whole, *shares, strict=True):
        counted = [window for mine, part in parts if part.share for window in mine]
        assert sorted(counted) == sorted(batch) and all(mine for mine, _ in parts)
        assert all(len(mine) <= size and part.windows == len(batch) for mine, part in parts)
        mean = sum(part.share * sum(mine) / len(mine) for mine, part in parts) / processes
        assert mean == pytest.approx(sum(batch) / len(batch), rel=1e-12)


# --- training


def test_ddp_is_one_process_with_the_same_global_batch(alone, pair):
    assert checkpoint(alone)["global_step"] == 4
    assert_close(state(pair), state(alone), 1e-10)
    for found, expected in zip(losses(pair).values(), losses(alone).values(), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert checkpoint(pair)["best"] == pytest.approx(checkpoint(alone)["best"], rel=1e-12)


def test_accumulated_batches_are_one_process_s_too(options, tmp_path):
    arguments = ("fit", *options, "--training.accumulate=2", "--training.epochs=1", "--training.batches=3")
    wider = ("--data.training_slots=[0,16]",)  # twelve windows: a step of two batches, and one of the third
    assert together((*arguments, *wider, "--data.batch_size=2", "--out", tmp_path / "pair"), tmp_path / "said") == [
        0,
        0,
    ]
    assert end(start((*arguments, *wider, "--data.batch_size=4", "--out", tmp_path / "alone"), tmp_path / "it")) == 0
    assert checkpoint(tmp_path / "pair")["global_step"] == 2
    assert_close(state(tmp_path / "pair"), state(tmp_path / "alone"), 1e-10)


@pytest.fixture(scope="module")
def sharded(options, alone, tmp_path_factory):
    """The folder of a run by FSDP, and its options. `alone` comes first: it writes the road maps, which two would race for."""
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    arguments = ("fit", *options, "--training.precision=32-true", "--data.batch_size=2", "--training.strategy=fsdp")
    said = folder.with_suffix(".said")
    assert together((*arguments, "--out", folder), said, nothing, no_writing) == [0, 0], (said / "1").read_text()
    return folder, arguments


def test_fsdp_is_one_process_with_the_same_global_batch(sharded, alone):
    """In float32, as Lightning has it, against float64."""
    expected = {name: value.float() for name, value in state(alone).items()}
    assert_close(state(sharded[0]), expected, 1e-3)
    for found, expected in zip(losses(sharded[0]).values(), losses(alone).values(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_fsdp_goes_on(sharded, tmp_path):
    """From the middle of an epoch, bit for bit; and its checkpoint is one that a process by itself goes on from."""
    (whole, arguments), run, said = sharded, tmp_path / "run", tmp_path / "said"
    begun = together((*arguments, ALWAYS, "--out", run), said, *(partial(killed_in_step, 4),) * WORLD)
    assert begun == [-signal.SIGKILL] * WORLD, [(said / str(rank)).read_text() for rank in range(WORLD)]
    assert checkpoint(run)["global_step"] == 2
    other = shutil.copytree(run, tmp_path / "other")
    assert together(("fit", "--resume", run), said) == [0, 0], (said / "0").read_text()
    assert_close(state(run), state(whole), 0)
    alone = ("--training.strategy=auto", "--data.batch_size=4")
    assert end(start(("fit", "--resume", other, *alone), tmp_path / "it")) == 0
    assert_close(state(other), state(whole), 1e-4)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient(name):
    """DDP waits for one that does not."""
    model = make(name)
    model.loss(*window()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_recipe_is_one_process_s_with_the_same_global_batch(options, cities, tmp_path):
    """Its table, too, which one process makes of all windows."""
    tunings = [
        f"--{tuning}.{name}" for tuning in ("city", "frame") for name in ("epochs=1", "batches=2", "learning_rate=1e-3")
    ]
    arguments = ("recipe", "paper", *options, *tunings, "--training.epochs=1")
    pair, one, said = tmp_path / "pair", tmp_path / "alone", tmp_path / "said"
    assert end(start((*arguments, "--data.batch_size=4", "--out", one), tmp_path / "it")) == 0
    assert together((*arguments, "--data.batch_size=2", "--out", pair), said) == [0, 0], (said / "0").read_text()
    for run in ("base", "city/There", "frame/There/1", "frame/There/2"):
        assert_close(state(pair / run), state(one / run), 1e-10)
    found, expected = (yaml.safe_load((folder / "scores.yaml").read_text()) for folder in (pair, one))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name]["mse"] == pytest.approx(expected[name]["mse"], rel=1e-6), name


# --- what ends one of them


def test_a_process_is_killed_and_both_go_on(options, alone, pair, tmp_path):
    """By two, the undisturbed run bit for bit; by one with the same global batch, the same up to rounding."""
    run, said = tmp_path / "run", tmp_path / "said"
    arguments = ("fit", *options, "--data.batch_size=2", ALWAYS, "--out", run)
    assert together(arguments, said, nothing, partial(at_call, CrevNet, "loss", 4, kill)) == [2, -signal.SIGKILL]
    (line,) = errors(said)
    assert "another training process has ended" in line and line.endswith(f"crevnet fit --resume {run}")
    assert checkpoint(run)["global_step"] == 3
    other = shutil.copytree(run, tmp_path / "other")
    assert together(("fit", "--resume", run), said) == [0, 0]
    assert_close(state(run), state(pair), 0)
    assert end(start(("fit", "--resume", other, "--data.batch_size=4"), tmp_path / "it")) == 0
    assert_close(state(other), state(alone), 1e-10)


def damaged():
    raise DataError("a file is damaged")


def test_sigterm_to_both_saves(options, tmp_path):
    said, run = tmp_path / "said", tmp_path / "run"
    before = (partial(sent, 3, signal.SIGTERM),) * WORLD
    assert together(("fit", *options, "--data.batch_size=2", "--out", run), said, *before) == [143, 143]
    (line,) = errors(said)
    assert "stopped by SIGTERM" in line
    assert checkpoint(run)["global_step"] >= 2


@pytest.mark.parametrize("rank", range(WORLD))
def test_an_error_in_one_is_said_once_and_ends_both(rank, options, tmp_path):
    before = [nothing] * WORLD
    before[rank] = partial(at_call, CrevNet, "loss", 2, damaged)
    said, run = tmp_path / "said", tmp_path / "run"
    assert together(("fit", *options, "--out", run), said, *before) == [2, 2]
    (line,) = errors(said)
    assert line.startswith("crevnet: a file is damaged; ")
    assert checkpoint(run)["global_step"] == 1


def test_an_error_in_both_is_said_once(options, tmp_path):
    said = tmp_path / "said"
    assert together(("fit", *options, "--out", tmp_path, "--data.cities=[Nowhere]"), said) == [2, 2]
    (line,) = errors(said)
    assert "Nowhere" in line


def test_fsdp_refuses_a_precision_that_it_does_not_know(failing, small):
    line = failing("fit", *small, "--training.strategy=fsdp", "--training.precision=16-mixed")
    assert "training.strategy fsdp" in line and "16-mixed" in line


# --- as on the command line


def test_evaluate_scores_the_run_of_two(alone, pair, crevnet):
    assert crevnet("evaluate", pair).replace(str(pair), "") == crevnet("evaluate", alone).replace(str(alone), "")


@pytest.mark.parametrize(
    ("launcher", "option"),
    [
        ((), "--training.devices=2"),
        pytest.param(
            ("-m", "torch.distributed.run", "--nproc-per-node=2"), "--training.nodes=1", marks=pytest.mark.slow
        ),
    ],
)
def test_launched_from_the_shell(launcher, option, options, pair, tmp_path):
    arguments = ("fit", *options, "--data.batch_size=2", option, "--out", tmp_path / "run")
    command = [sys.executable, *launcher, "-m", "crevnet.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'models'}", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("best validation") == 1
    assert_close(state(tmp_path / "run"), state(pair), 1e-12)
