"""Runs that are killed, and go on: every bit is that of the run that nobody has disturbed."""

import errno
import fcntl
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import (
    end,
    killed_before_replacing,
    killed_in_optimizer,
    killed_in_step,
    killed_in_validation,
    killed_in_write,
    nothing,
    sent,
    start,
    waiting_in_step,
    workers_killed,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crevnet import CrevNet
from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.windows import Windows
from crevnet.figures.curves import date_logs_before, learning_curves
from crevnet.machine.errors import SettingsError
from crevnet.machine.folders import only_process
from crevnet.training.failures import TrainingError
from crevnet.training.settings import load_settings
from crevnet.training.trainer import train

EPOCHS, BATCHES = 2, 6
ALWAYS = 1e-9  # minutes between checkpoints


def checkpoint(folder, which="last"):
    return torch.load(folder / "checkpoints" / f"{which}.ckpt", map_location="cpu", weights_only=True)


def scalars(folder):
    """Tag -> the (step, value) that TensorBoard shows."""
    with tempfile.TemporaryDirectory() as copy:  # names have a process and a second: here many are of the same second
        files = sorted((folder / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
        for number, path in enumerate(files):
            shutil.copy(path, f"{copy}/events.out.tfevents.{number:04d}")
        events = EventAccumulator(copy)
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in ("train/loss", "val/mse")}


def differences(found, expected, name="checkpoint"):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        return [d for key in expected for d in differences(found[key], expected[key], f"{name}.{key}")]
    if isinstance(expected, list):
        assert len(found) == len(expected), name
        return [
            d for i, pair in enumerate(zip(found, expected, strict=True)) for d in differences(*pair, f"{name}[{i}]")
        ]
    same = torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    return [] if same else [name]


def assert_same_run(found, expected):
    """Weights, Adam's state, counters, random numbers, scores and curves, to the last bit."""
    for which in ("best", "last"):
        checkpoints = [checkpoint(folder, which) for folder in (found, expected)]
        for found_data in (c.pop("data") for c in checkpoints):
            assert found_data  # of copies of the same files, with other dates
        for plan in (c.pop("memory", None) for c in checkpoints):
            assert (plan is None) == (
                "autoencoder" not in "".join(checkpoints[0]["state_dict"])
            )  # of that moment's free memory
        for loops in (c["loops"]["fit_loop"] for c in checkpoints):
            loops.pop("state_dict")  # the loader's place and the validation's total, both of the epoch that is over
            loops.pop("epoch_loop.val_loop.batch_progress")
        assert differences(*checkpoints) == []
    assert scalars(found) == scalars(expected)
    assert not list(found.rglob("*.unfinished"))


@pytest.fixture(scope="module")
def short(settings):
    data = replace(settings.data, cities=["Here"], batch_size=2)
    training = replace(settings.training, epochs=EPOCHS, batches=BATCHES, checkpoint_minutes=ALWAYS)
    return replace(settings, data=data, training=training)


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(short, folder)
    return folder


@pytest.fixture
def child(short, tmp_path):
    """Begins that run, or goes on with it, in a process."""

    def begin(*options, before=nothing, resume=False):
        short.save(tmp_path / "settings")
        config = tmp_path / "settings" / "config.yaml"
        where = ("--resume", tmp_path / "run") if resume else ("--config", config, "--out", tmp_path / "run")
        return start(("fit", *where, *options), tmp_path / "said", before)

    return begin


# --- killed


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (killed_in_step, 5),
        (killed_in_step, BATCHES + 2),
        (killed_in_optimizer, 4),
        (killed_in_validation, 2),
        (killed_in_write, 3),
        (killed_in_write, BATCHES),  # best.ckpt of the first epoch
        (killed_in_write, BATCHES + 1),
        (killed_before_replacing, BATCHES + 1),
    ],
)
def test_killed_at_a_chosen_moment(moment, step, child, short, whole, tmp_path):
    assert end(child(before=partial(moment, step))) == -signal.SIGKILL
    run = tmp_path / "run"
    before = checkpoint(run)  # whole, whatever the moment
    done = {
        killed_in_step: step - 1,
        killed_in_optimizer: step - 1,
        killed_in_validation: BATCHES,
    }.get(moment, min(step, BATCHES))
    assert before["global_step"] >= done - 2  # one interval, here of one step, and the step that was going on
    assert len(list(run.rglob("*.unfinished"))) == (moment in (killed_in_write, killed_before_replacing))
    train(short, run, resume=True)
    assert_same_run(run, whole)


def test_killed_at_random_moments(child, short, whole, tmp_path):
    moments, run = random.Random(0), tmp_path / "run"
    for number in range(4):
        process = child(resume=number > 0)
        last = run / "checkpoints" / "last.ckpt"
        since = time.time_ns()
        while process.is_alive() and not (last.is_file() and last.stat().st_mtime_ns > since):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        assert end(process) in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
        assert checkpoint(run)["global_step"] >= 1
    train(short, run, resume=True)
    assert_same_run(run, whole)


# --- twice at once


@pytest.mark.parametrize("step", [1, 4])
def test_a_folder_in_which_another_process_trains_is_refused(step, child, short, whole, failing, tmp_path):
    """Until that one is killed: then at once, though the processes that read its data live on for seconds."""
    run = tmp_path / "run"
    process = child("--data.workers=2", before=partial(waiting_in_step, step))
    there = run / "checkpoints" / "last.ckpt" if step > 1 else run / "config.yaml"
    while process.is_alive() and not there.is_file():
        time.sleep(0.01)
    config = tmp_path / "settings" / "config.yaml"
    line = failing("fit", *(("--resume", run) if step > 1 else ("--config", config, "--out", run)))
    assert line.startswith(f"crevnet: {run} is in use: another process is training in it; wait until it ends")
    process.kill()
    while Path(f"/proc/{process.pid}").exists():  # `end` would wait for the processes that read data, too
        time.sleep(0.001)
    train(short, run, resume=step > 1)
    assert_same_run(run, whole)
    assert not (run / "training.lock").exists()
    assert end(process) == -signal.SIGKILL


def test_a_run_that_came_while_the_data_were_opened_is_kept(short, whole, tmp_path, monkeypatch):
    """Another process has begun there since, and ended."""

    def open_data(*arguments):
        shutil.copytree(whole, run)
        return CityData(*arguments)

    run = tmp_path / "run"
    monkeypatch.setattr("crevnet.training.trainer.CityData", open_data)
    with pytest.raises(DataError, match="already contains a trained run"):
        train(short, run)
    assert_same_run(run, whole)


def test_a_lock_that_its_holder_removes_is_not_held_by_two(tmp_path, monkeypatch):
    """Opened before its holder removed it, and locked after: a third process would make and lock another."""
    lock = fcntl.lockf

    def removed_before(file, how):
        (tmp_path / "training.lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", removed_before)
    with pytest.raises(SettingsError, match="another process is training in it"), only_process(tmp_path):
        pass


def test_a_file_system_without_locks_is_trained_on(short, whole, tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    train(short, tmp_path)
    assert_same_run(tmp_path, whole)


# --- told to stop


@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_stopped_by_a_signal(what, accumulate, child, short, whole, tmp_path):
    settings = replace(short, training=replace(short.training, accumulate=accumulate))
    run = tmp_path / "run"
    rarely = ("--training.checkpoint_minutes=60", f"--training.accumulate={accumulate}")
    assert end(child(*rarely, before=partial(sent, 5, what))) == 128 + what
    said = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("crevnet: ")]
    assert said == [
        f"crevnet: stopped by {what.name}; the last checkpoint is {run / 'checkpoints' / 'last.ckpt'}: resume from "
        f"it with crevnet fit --resume {run}"
    ]
    finished = 4 if what == signal.SIGINT else 5  # the step in which it came is finished where it can be
    assert checkpoint(run)["global_step"] == (finished if accumulate == 1 else 1)
    train(settings, run, resume=True)
    if accumulate > 1:
        whole = tmp_path / "whole"
        train(settings, whole)
    assert_same_run(run, whole)


@pytest.mark.parametrize("everybody", [True, False])
def test_workers_that_are_killed(everybody, child, short, whole, tmp_path):
    """Together with the process that trains, or alone, by the system that runs out of memory."""
    before = partial(sent, 3, signal.SIGTERM, to_group=True) if everybody else partial(workers_killed, 3)
    status = end(child("--training.checkpoint_minutes=60", "--data.workers=2", before=before))
    said, run = (tmp_path / "said").read_text(), tmp_path / "run"
    assert "Traceback" not in said and f"--resume {run}" in said
    assert (status == 1) == ("a process that reads data has died (DataLoader worker" in said)
    assert status == 1 or (everybody and status == 128 + signal.SIGTERM)  # whichever is heard of first
    train(short, run, resume=True)
    assert_same_run(run, whole)


# --- interrupted again and again, in this process


def interrupt(monkeypatch, name, number, owner=CrevNet):
    """Let the `number`-th call from now on of a method of CrevNet fail."""
    function, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise DataError("a file is damaged")
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


def go_on_until_done(settings, folder, monkeypatch, failures):
    """Train with one failure after the other; returns how many batches have been trained on, and where each ended."""
    losses, steps, loss = [], [], CrevNet.loss
    monkeypatch.setattr(CrevNet, "loss", lambda *arguments: losses.append(1) or loss(*arguments))
    for number, (name, call) in enumerate(failures):
        with monkeypatch.context() as patch:
            interrupt(patch, name, call)
            with pytest.raises(
                TrainingError, match=r"a file is damaged; .*the last checkpoint is .*last\.ckpt.*--resume"
            ):
                train(settings, folder, resume=number > 0)
        steps.append(checkpoint(folder)["global_step"])
    train(settings, folder, resume=True)
    return len(losses), steps


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_run_is_the_uninterrupted_one(workers, short, whole, tmp_path, monkeypatch):
    settings = replace(
        short,
        data=replace(short.data, workers=workers),
        training=replace(short.training, checkpoint_minutes=60),
    )
    failures = [("loss", 3), ("loss", 2), ("generate", 2), ("loss", 4), ("generate", 1)]
    losses, steps = go_on_until_done(settings, tmp_path, monkeypatch, failures)
    assert steps == [2, 3, BATCHES, BATCHES + 3, 2 * BATCHES]
    assert losses == EPOCHS * BATCHES  # what has been computed is computed once
    assert_same_run(tmp_path, whole)


def test_interrupted_between_the_batches_of_a_step(short, tmp_path, monkeypatch):
    """Here accumulate 4 of 6 batches: steps of 4 and 2."""
    settings = replace(short, training=replace(short.training, accumulate=4))
    train(settings, tmp_path / "whole")
    losses, steps = go_on_until_done(settings, tmp_path / "parts", monkeypatch, [("loss", 6), ("loss", 2), ("loss", 7)])
    assert steps == [1, 1, 3]
    assert losses == EPOCHS * BATCHES + 1 + 1  # those whose gradients were not complete
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_random_numbers_go_on(short, tmp_path, monkeypatch):
    """Of a model that draws: a loss on noisy frames."""
    loss = CrevNet.loss
    monkeypatch.setattr(CrevNet, "loss", lambda net, frames, *more: loss(net, frames + torch.randn_like(frames), *more))
    train(short, tmp_path / "whole")
    go_on_until_done(short, tmp_path / "parts", monkeypatch, [("loss", 3), ("generate", 1), ("loss", 2)])
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_weights_that_are_changing_are_not_kept(short, whole, tmp_path, monkeypatch):
    """Interrupted within a step of the optimizer: the checkpoint of before it stays."""
    adam, steps = torch._fused_adam_, []

    def interrupted(*arguments, **options):
        adam(*arguments, **options)
        steps.append(1)
        if len(steps) == 4:
            raise DataError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_adam_", interrupted)
        with pytest.raises(TrainingError, match="in the middle"):
            train(short, tmp_path)
    assert checkpoint(tmp_path)["global_step"] == 3
    train(short, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


# --- resumed with other settings


def test_best_checkpoint_stays_the_best(run, settings, tmp_path, monkeypatch):
    """If the epochs after it, of a run that goes on elsewhere, have worse scores."""
    copy = shutil.copytree(run, tmp_path / "copy")
    before = (copy / "checkpoints" / "best.ckpt").read_bytes()
    monkeypatch.setattr(CrevNet, "generate", lambda net, past, *_: torch.ones_like(past[:, :2]))
    found = train(replace(settings, training=replace(settings.training, epochs=2)), copy, resume=True)
    assert found == checkpoint(run)["best"] < 1
    assert (copy / "checkpoints" / "best.ckpt").read_bytes() == before


def test_resumed_with_another_learning_rate(short, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "loss", 3)
        with pytest.raises(TrainingError):
            train(short, tmp_path)
    train(replace(short, training=replace(short.training, learning_rate=1e-5)), tmp_path, resume=True)
    last = checkpoint(tmp_path)
    assert last["global_step"] == EPOCHS * BATCHES and last["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-5
    assert load_settings(tmp_path).training.learning_rate == 1e-5
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(EPOCHS * BATCHES))


def test_epoch_begins_anew_with_another_batch_size(short, tmp_path, monkeypatch):
    seen, item = [], Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda windows, i: seen.append(i) or item(windows, i))
    settings = replace(short, training=replace(short.training, batches=None, epochs=1))
    with monkeypatch.context() as patch:
        interrupt(patch, "loss", 3)
        with pytest.raises(TrainingError):
            train(settings, tmp_path)
    before = checkpoint(tmp_path)
    seen.clear()
    monkeypatch.setattr(CrevNet, "generate", lambda net, past, *_: past[:, :2])
    train(replace(settings, data=replace(settings.data, batch_size=4)), tmp_path, resume=True)
    windows = 2 * (20 - 5 + 1)
    assert sorted(seen[:windows]) == list(range(windows))
    last = checkpoint(tmp_path)
    assert (before["global_step"], last["global_step"]) == (2, 2 + windows / 4)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(2 + windows // 4))


# --- resumed with other data, or another clock


def interrupted(short, folder, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "loss", 3)
        with pytest.raises(TrainingError):
            train(short, folder)


@pytest.mark.parametrize("change", ["date", "size", "name", "nothing"])
def test_other_data_are_said(change, short, own_cities, tmp_path, monkeypatch, recwarn):
    settings, run = replace(short, data=replace(short.data, root=own_cities)), tmp_path / "run"
    interrupted(settings, run, monkeypatch)
    name = "Here/Here_training/20180102_100m_bins.h5"
    day = own_cities / name
    before = day.stat()
    if change == "date":
        os.utime(day, (0, 0))
    elif change == "size":
        day.write_bytes(day.read_bytes() + b"0")
        os.utime(day, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "name":
        day.rename(day.with_name("20180105_100m_bins.h5"))
    recwarn.clear()
    train(settings, run, resume=True)
    said = [str(w.message) for w in recwarn if "the data differ" in str(w.message)]
    if change == "nothing":
        assert said == []
        return
    [warning] = said
    assert f"{name} " in warning and f"had {before.st_size} bytes of" in warning and "restore the files" in warning
    assert ("2 files differ" in warning) == (change == "name")


def test_a_clock_that_goes_back_hides_no_curves(short, whole, tmp_path, monkeypatch):
    """By a day: the logs of the run so far are dated after those of the resumed one."""
    interrupted(short, tmp_path, monkeypatch)
    [log] = (tmp_path / "tensorboard").glob("events.*")
    later = f"events.out.tfevents.{int(time.time()) + 86_400:010d}.zzz"
    log.rename(log.with_name(later))
    train(short, tmp_path, resume=True)
    expected = learning_curves(whole)["train/loss"]
    found = learning_curves(tmp_path)["train/loss"]
    assert found.steps.tolist() == expected.steps.tolist() and found.values.tolist() == expected.values.tolist()


def test_logs_that_are_dated_back_keep_their_order_and_content(tmp_path):
    """Though their processes had the same number, as in containers, and the second before is taken."""
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    for second, content in ((99, "a"), (100, "b"), (200, "c"), (300, "d")):
        (folder / f"events.out.tfevents.{second:010d}.host.7.0").write_text(content)
    date_logs_before(tmp_path, 102)
    assert [(int(p.name.split(".")[3]), p.read_text()) for p in sorted(folder.iterdir())] == [
        (98, "a"), (99, "b"), (100, "c"), (101, "d"),
    ]  # fmt: skip
