"""Whatever ends a training run before its time: one line that names it, nothing lost, and training goes on when it is mended."""

import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial

import h5py
import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from processes import at_call, end, everything_wrong, start, with_little_disk, with_little_disk_from
from test_resuming import assert_same_run, checkpoint, scalars

from crevnet import CrevNet
from crevnet.cli import main
from crevnet.data.errors import DataError
from crevnet.training.trainer import train

BATCHES = 10


def fit(root, *more):
    """Trains two epochs of the windows of three days, in batches of 2."""
    size = ("--data.batch_size=2", f"--training.batches={BATCHES}", "--training.epochs=2")
    rarely = "--training.checkpoint_minutes=60"  # so that what is kept is kept because something has failed
    return ("fit", "--data.root", root, *size, "--training.learning_rate=1e-3", rarely, *more)


@pytest.fixture
def options(small, own_cities):
    """Such a run on data that may be damaged."""
    return fit(own_cities, *small)


@pytest.fixture(scope="module")
def whole(small, cities, tmp_path_factory):
    """Its folder, undisturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main([str(a) for a in fit(cities, *small, "--out", folder)])
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """Do something in the `number`-th step from now on; or before a forecast."""

    def begin(number, action, name="loss"):
        monkeypatch.setattr(CrevNet, name, getattr(CrevNet, name))  # to be undone
        at_call(CrevNet, name, number, action)

    return begin


def raising(error):
    def action():
        raise error

    return action


# --- data that goes away while training runs


def damage(folder):
    """Every slot of every day in the folder."""
    for path in folder.rglob("*.h5"):
        with h5py.File(path) as file:
            array = file["array"].id
            chunks = [array.get_chunk_info(i) for i in range(array.get_num_chunks())]
        with path.open("r+b") as file:
            for chunk in chunks:
                file.seek(chunk.byte_offset)
                file.write(bytes(chunk.size))


@pytest.mark.parametrize(("what", "workers"), [("training", 0), ("training", 2), ("validation", 0), ("everything", 2)])
def test_data_damaged_or_gone_within_an_epoch(
    what, workers, options, own_cities, whole, crevnet, failing, at_step, tmp_path
):
    run, spare = tmp_path / "run", shutil.copytree(own_cities, tmp_path / "spare")
    action = {
        "training": partial(damage, own_cities / "Here" / "Here_training"),
        "validation": partial(damage, own_cities / "Here" / "Here_validation"),
        "everything": partial(shutil.rmtree, own_cities),
    }[what]
    at_step(2, action)
    line = failing(*options, f"--data.workers={workers}", "--out", run)
    slots = "" if what == "everything" else r", slots \d+ to \d+,"
    assert re.search(rf"Here/Here_\w+/201801\d\d_100m_bins\.h5{slots} cannot be read", line)
    assert f"the last checkpoint is {run / 'checkpoints' / 'last.ckpt'}" in line and f"--resume {run}" in line
    if what == "validation":
        assert checkpoint(run)["global_step"] == BATCHES
    shutil.copytree(spare, own_cities, dirs_exist_ok=True)
    crevnet("fit", "--resume", run)
    assert_same_run(run, whole)


# --- a disk that is full


def test_checkpoint_that_finds_no_room(options, whole, tmp_path, crevnet):
    run = tmp_path / "run"
    crevnet(*options, "--out", run, "--training.epochs=1")
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    little = partial(with_little_disk, len(before) // 2)
    process = start(("fit", "--resume", run, "--training.epochs=2"), tmp_path / "said", little)
    assert end(process) == 1
    *_, line = (tmp_path / "said").read_text().splitlines()
    assert re.match(rf"crevnet: {run}/checkpoints/(best|last)\.ckpt could not be written \(File too large\)", line)
    assert f"the last checkpoint is {last}" in line and f"--resume {run}" in line
    assert last.read_bytes() == before
    assert not list(run.rglob("*.unfinished"))
    crevnet("fit", "--resume", run, "--training.epochs=2")
    assert_same_run(run, whole)


def test_curves_that_find_no_room(options, tmp_path):
    run = tmp_path / "run"
    little = partial(with_little_disk_from, BATCHES + 3, 1000)  # TensorBoard's thread finds it out
    assert end(start((*options, "--out", run), tmp_path / "said", little)) == 1
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    *_, line = said.splitlines()
    assert line.startswith("crevnet: the run's folder could not be written to (File too large): free disk space")
    assert f"--resume {run}" in line
    assert checkpoint(run)["global_step"] == BATCHES


def test_first_failure_is_the_one_that_is_named(options, tmp_path):
    """Though what has been computed finds no room then."""
    process = start((*options, "--out", tmp_path / "run"), tmp_path / "said", partial(everything_wrong, 3, 2000))
    assert end(process) == 2
    assert "crevnet: a file is damaged; no checkpoint has been written yet\n" in (tmp_path / "said").read_text()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_settings_that_find_no_room(own_run, tmp_path):
    config = own_run / "config.yaml"
    before = config.read_bytes()
    little = partial(with_little_disk, len(before) - 1)
    assert end(start(("fit", "--resume", own_run, "--training.epochs=2"), tmp_path / "said", little)) == 1
    [line] = (tmp_path / "said").read_text().splitlines()
    assert line.startswith(
        f"crevnet: no space left for {config} (File too large): raise the limit on the size of files"
    )
    assert config.read_bytes() == before and not list(own_run.rglob("*.unfinished"))


def test_file_system_that_is_full(own_run, tmp_path):
    """A tmpfs, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = shutil.copytree(own_run, disk / "run")
        last = run / "checkpoints" / "last.ckpt"
        before = last.read_bytes()
        with (disk / "other").open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space"):
                while file.write(bytes(4096)):
                    pass
            file.truncate(file.tell() - 32768)  # room for the curves
        assert end(start(("fit", "--resume", run, "--training.epochs=2"), tmp_path / "said")) == 1
        said = (tmp_path / "said").read_text()
        assert "Traceback" not in said
        assert re.search(r"(?m)^crevnet: .*\.ckpt could not be written \(No space left on device\)", said)
        assert last.read_bytes() == before and not list(run.rglob("*.unfinished"))
    finally:
        subprocess.run(["umount", disk], check=True)


# --- numbers


def with_nan(network):
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)


def test_loss_that_is_no_number(options, crevnet, failing, monkeypatch, tmp_path):
    """The step in which it is so is the last; the checkpoint of before goes on with another learning rate."""
    run, steps, loss = tmp_path / "run", [], CrevNet.loss
    crevnet(*options, "--out", run, "--training.epochs=1")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()

    def watched(network, *arguments):
        steps.append(1)
        if len(steps) == 3:
            with_nan(network)
        return loss(network, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CrevNet, "loss", watched)
        line = failing("fit", "--resume", run, "--training.epochs=2")
    assert f"the loss is nan in step {BATCHES + 3}: lower --training.learning_rate (it is 0.001)" in line
    assert (
        f"the last checkpoint is {run / 'checkpoints' / 'last.ckpt'}" in line
        and "best.ckpt" in line
        and f"--resume {run}" in line
    )
    assert len(steps) == 3
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    crevnet("fit", "--resume", run, "--training.epochs=2", "--training.learning_rate=1e-4")
    assert checkpoint(run)["global_step"] == 2 * BATCHES
    assert checkpoint(run)["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-4
    assert [step for step, _ in scalars(run)["train/loss"]] == list(range(2 * BATCHES))


def test_score_that_is_no_number(options, crevnet, failing, monkeypatch, tmp_path):
    run, generate = tmp_path / "run", CrevNet.generate
    with monkeypatch.context() as patch:
        patch.setattr(CrevNet, "generate", lambda *arguments: with_nan(arguments[0]) or generate(*arguments))
        line = failing(*options, "--out", run)
    assert "the validation MSE is nan after epoch 1: lower --training.learning_rate" in line
    assert "no checkpoint has been written yet" in line
    assert not list((run).rglob("*.ckpt"))


def test_learning_rate_that_is_far_too_high(options, crevnet, failing, tmp_path):
    """Weights of that size cannot be undone: the engine's guard says so, and no checkpoint has them, though each step has one."""
    run = tmp_path / "run"
    crevnet(*options, "--out", run, "--training.epochs=1")
    often = ("--training.epochs=2", "--training.checkpoint_minutes=1e-9", "--model.memory_budget=min")
    line = failing("fit", "--resume", run, "--training.learning_rate=9e5", *often)
    assert "was recomputed with an error" in line and "lower --training.learning_rate (it is 900000)" in line
    assert max(w.abs().max() for w in checkpoint(run)["state_dict"].values()) < 2
    crevnet("fit", "--resume", run, "--training.learning_rate=1e-3", "--training.epochs=2")
    assert checkpoint(run)["global_step"] == 2 * BATCHES


def test_best_checkpoint_copied_over_the_last_is_gone_on_from(options, whole, crevnet, tmp_path):
    run = tmp_path / "run"
    crevnet(*options, "--out", run, "--training.epochs=1")
    shutil.copy(run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt")
    crevnet("fit", "--resume", run, "--training.epochs=2")
    assert_same_run(run, whole)


def test_infinite_gradients_of_a_scaled_loss_are_no_failure(settings, tmp_path, monkeypatch):
    """GradScaler begins with a scale that is too large here, and finds a smaller one."""
    trainer = lightning.Trainer
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def scaled(precision, plugins, **more):
        return trainer(plugins=[*plugins, MixedPrecision("16-mixed", "cpu", scaler)], **more)

    monkeypatch.setattr(lightning, "Trainer", scaled)
    train(replace(settings, training=replace(settings.training, epochs=1, batches=4)), tmp_path)
    assert scaler.get_scale() < 2.0**127
    assert all(w.isfinite().all() for w in checkpoint(tmp_path)["state_dict"].values())


# --- memory


def test_out_of_memory(options, whole, crevnet, failing, at_step, tmp_path):
    run = tmp_path / "run"
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB"
    at_step(BATCHES + 4, raising(torch.OutOfMemoryError(said)))
    line = failing(*options, "--out", run, status=1)
    for remedy in ("--data.batch_size (it is 2)", "--model.states", "--training.precision"):
        assert remedy in line
    assert "out of memory (CUDA out of memory)" in line and f"--resume {run}" in line
    assert checkpoint(run)["global_step"] == BATCHES + 3
    crevnet("fit", "--resume", run)
    assert_same_run(run, whole)


def test_out_of_memory_in_the_first_step(options, failing, at_step, crevnet, tmp_path):
    at_step(1, raising(torch.OutOfMemoryError("CUDA out of memory.")))
    line = failing(*options, "--out", tmp_path / "run", status=1)
    assert "no checkpoint has been written yet" in line
    crevnet(*options, "--out", tmp_path / "run", "--data.batch_size=1")  # nothing stands in the way


# --- what nobody has foreseen, or should have


def test_weights_alone_are_nothing_to_resume(own_run, failing):
    path = own_run / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": torch.load(path, weights_only=True)["state_dict"]}, path)
    line = failing("fit", "--resume", own_run, "--training.epochs=2")
    assert str(path) in line and "optimizer_states" in line


def test_unforeseen_errors_are_not_hidden(settings, tmp_path, at_step):
    at_step(2, raising(ZeroDivisionError("a mistake")))
    with pytest.raises(ZeroDivisionError):
        train(settings, tmp_path)
    assert checkpoint(tmp_path)["global_step"] == 1  # not even that is lost


def test_fewer_epochs_than_there_have_been(settings, tmp_path):
    train(replace(settings, training=replace(settings.training, epochs=3)), tmp_path)
    with pytest.raises(DataError, match=r"for more epochs than --training\.epochs 1: raise it"):
        train(settings, tmp_path, resume=True)
