"""Training on small day files: what it leaves behind, against training loops written out."""

import copy
import shutil
from dataclasses import replace
from functools import partial, partialmethod

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crevnet import CrevNet
from crevnet.data.city_data import CityData
from crevnet.data.errors import DataError
from crevnet.data.settings import DataSettings
from crevnet.training.checkpoint_reading import load_network
from crevnet.training.settings import load_settings
from crevnet.training.task import VideoModelTask
from crevnet.training.trainer import train

WINDOW = 5


def checkpoint(folder, which="last"):
    return torch.load(folder / "checkpoints" / f"{which}.ckpt", map_location="cpu", weights_only=True)


def weights(folder, which="last"):
    return {k.removeprefix("network."): v for k, v in checkpoint(folder, which)["state_dict"].items()}


def assert_same_weights(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() < tolerance, name


def scalars(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def one_window(settings):
    """A run on a single window, so that the order of the windows is no matter; validated on it too.

    All its steps recompute, as those by hand do: Adam's first steps magnify rounding errors of the smallest gradients.
    """
    model = replace(settings.model, memory_budget="min")
    data = replace(
        settings.data,
        cities=["There"],
        training_slots=(2, 2 + WINDOW),
        validation_split="training",
        validation_slots=(2, 2 + WINDOW),
    )
    return replace(settings, model=model, data=data, training=replace(settings.training, batches=None))


@pytest.fixture(scope="module")
def window(points):
    """That window and its road map, from the array itself."""
    array = points(3)[2 : 2 + WINDOW]
    frames = torch.from_numpy(array.transpose(0, 3, 1, 2) / np.float32(255))[None]
    return frames, torch.from_numpy(array.any(-1).mean(0, dtype=np.float64).astype(np.float32))[None, None]


# --- what a run leaves


def test_folder_of_a_run(run, settings):
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "tensorboard"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert load_settings(run) == settings
    assert scalars(run, "val/mse")
    last = checkpoint(run)
    assert (last["epoch"], last["global_step"]) == (0, 2)


def validation_mse(network, points):
    """MSE of the generated future over the windows of both cities' validation days, straight from the arrays."""
    errors = []
    for training, validation in (((0, 1), 2), ((3,), 4)):
        days = np.concatenate([points(seed) for seed in training])
        roads = torch.from_numpy(days.any(-1).mean(0).astype(np.float32))[None, None]
        for start in (0, 5, 10, 15):
            frames = points(validation)[start : start + WINDOW].transpose(0, 3, 1, 2) / np.float32(255)
            window = torch.from_numpy(frames)[None]
            forecast = network.generate(window[:, :3], roads).clamp(0, 1)
            errors.append((forecast - window[:, 3:]).double().square().mean())
    return torch.stack(errors).mean().item()


def test_best_checkpoint_has_the_validation_score_that_is_returned(settings, points, tmp_path):
    training = replace(settings.training, epochs=3, learning_rate=0.02)
    found = train(replace(settings, data=replace(settings.data, batch_size=3), training=training), tmp_path)
    values = scalars(tmp_path, "val/mse")
    assert len(values) == 3 and found == pytest.approx(min(values), rel=1e-6)
    best = load_network(tmp_path, settings.model, "best")
    assert validation_mse(best, points) == pytest.approx(found, rel=1e-5)  # 8 windows in batches of 3, 3 and 2
    last = load_network(tmp_path, settings.model, "last")
    assert validation_mse(last, points) == pytest.approx(values[-1], rel=1e-5)


def test_last_checkpoint_is_the_last_even_if_no_better(one_window, tmp_path):
    training = replace(one_window.training, epochs=3, learning_rate=0.3)
    found = train(replace(one_window, training=training), tmp_path)
    values = scalars(tmp_path, "val/mse")
    assert len(values) == 3 and found == pytest.approx(min(values), rel=1e-6) and values[-1] > min(values)
    assert checkpoint(tmp_path, "last")["global_step"] == 3
    assert checkpoint(tmp_path, "best")["global_step"] == 1 + values.index(min(values))


# --- the training itself


def by_hand(settings, frames, roads, steps):
    """Adam on CrevNet.loss, without Lightning."""
    torch.manual_seed(settings.training.seed)
    model = CrevNet(settings.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.training.learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(frames, roads if settings.model.static else None, settings.training.loss)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("loss", ["all", "future", "padded"])
def test_training_is_adam_on_the_chosen_loss(one_window, window, loss, tmp_path):
    settings = replace(one_window, training=replace(one_window.training, epochs=2, loss=loss, seed=7))
    train(settings, tmp_path)
    model, _ = by_hand(settings, *window, steps=2)
    assert_same_weights(weights(tmp_path), model.state_dict())


def test_without_road_map_and_with_convlstm(one_window, window, tmp_path):
    settings = replace(one_window, model=replace(one_window.model, static=(), cell="convlstm"))
    train(settings, tmp_path)
    model, _ = by_hand(settings, *window, steps=1)
    assert_same_weights(weights(tmp_path), model.state_dict())


def test_loss_falls_on_a_single_window(one_window, window, tmp_path):
    settings = replace(one_window, training=replace(one_window.training, epochs=40, learning_rate=5e-3))
    train(settings, tmp_path)
    untrained = by_hand(settings, *window, steps=1)[1][0]
    logged = scalars(tmp_path, "train/loss")
    assert len(logged) == 40 and logged[0] == pytest.approx(untrained, rel=1e-5) and logged[-1] < untrained / 10
    trained = load_network(tmp_path, settings.model, "last").loss(*window).item()
    zeros = window[0][:, 1:].square().mean().item()
    assert trained < 0.1 * untrained
    assert trained < zeros  # better than predicting no data


def test_accumulated_batches_are_one_large_batch(one_window, tmp_path):
    """Two windows in two batches whose gradients add up, or in one batch: the same step."""
    data = replace(one_window.data, training_slots=(2, 2 + WINDOW + 1))
    large = replace(one_window, data=replace(data, batch_size=2))
    small = replace(one_window, data=replace(data, batch_size=1), training=replace(one_window.training, accumulate=2))
    train(large, tmp_path / "large")
    train(small, tmp_path / "small")
    assert checkpoint(tmp_path / "large")["global_step"] == checkpoint(tmp_path / "small")["global_step"] == 1
    assert_same_weights(weights(tmp_path / "small"), weights(tmp_path / "large"), 1e-5)
    not_added = replace(small, training=one_window.training)
    train(not_added, tmp_path / "not-added")
    assert checkpoint(tmp_path / "not-added")["global_step"] == 2


def test_resumed_run_is_the_uninterrupted_run(one_window, tmp_path, monkeypatch):
    def epochs(count):
        return replace(one_window, training=replace(one_window.training, epochs=count))

    train(epochs(4), tmp_path / "whole")
    train(epochs(2), tmp_path / "parts")
    before = checkpoint(tmp_path / "parts")
    assert (before["epoch"], before["global_step"]) == (1, 2)
    losses, loss = [], CrevNet.loss
    monkeypatch.setattr(CrevNet, "loss", lambda *arguments: losses.append(loss(*arguments)) or losses[-1])
    train(epochs(4), tmp_path / "parts", resume=True)
    assert len(losses) == 2  # it went on, instead of beginning again
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert (parts["epoch"], parts["global_step"]) == (whole["epoch"], whole["global_step"]) == (3, 4)
    assert_same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert any((before["state_dict"][k] - parts["state_dict"][k]).abs().max() > 1e-4 for k in parts["state_dict"])
    moments = [c["optimizer_states"][0]["state"] for c in (parts, whole)]
    assert moments[0].keys() == moments[1].keys()
    for k in moments[0]:
        assert moments[0][k]["step"] == moments[1][k]["step"] == 4
        torch.testing.assert_close(moments[0][k]["exp_avg_sq"], moments[1][k]["exp_avg_sq"], rtol=1e-3, atol=1e-9)
    assert load_settings(tmp_path / "parts").training.epochs == 4


@pytest.mark.parametrize("change", [{}, {"precision": "64-true"}, {"channels_last": True}, {"precision": "16-mixed"}])
def test_what_another_adam_has_saved_is_resumed(one_window, tmp_path, monkeypatch, change):
    """As that one itself goes on with it, in another precision or layout too."""

    def unfused(task):
        return torch.optim.Adam(task.network.parameters(), task.training_settings.learning_rate)

    def scaled(trainer, precision, plugins, **options):
        """Lightning's mixed precision, which it only has for GPUs, on the CPU."""
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        return trainer(plugins=[*plugins, plugin], **options)

    if change == {"precision": "16-mixed"}:
        monkeypatch.setattr(lightning, "Trainer", partial(scaled, lightning.Trainer))
    found, expected = tmp_path / "found", tmp_path / "expected"
    more = replace(one_window, training=replace(one_window.training, epochs=4, **change))
    with monkeypatch.context() as patch:
        patch.setattr(VideoModelTask, "configure_optimizers", unfused)
        train(replace(one_window, training=replace(one_window.training, epochs=2)), expected)
        shutil.copytree(expected, found)
        before = weights(expected)
        train(more, expected, resume=True)
    train(more, found, resume=True)
    assert_same_weights(weights(found), weights(expected))
    assert any((weights(found)[k] - v).abs().max() > 1e-4 for k, v in before.items())


def test_adam_is_fused(run):
    assert checkpoint(run)["optimizer_states"][0]["param_groups"][0]["fused"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_gradient_outlives_its_step(one_window, tmp_path, monkeypatch, accumulate):
    """The forward pass, whose activations are alive beside them, sees those gradients alone that are added up."""
    data = replace(one_window.data, training_slots=(2, 2 + WINDOW + 1), batch_size=1)
    training = replace(one_window.training, epochs=2, accumulate=accumulate)
    alive, loss = [], CrevNet.loss

    def watched(network, *arguments):
        alive.append(any(p.grad is not None for p in network.parameters()))
        return loss(network, *arguments)

    monkeypatch.setattr(CrevNet, "loss", watched)
    train(replace(one_window, data=data, training=training), tmp_path)
    assert alive == [False, accumulate == 2] * 2


def task_like(task, **options):
    """Of the same weights, with other training settings."""
    other = VideoModelTask(task.network.config, replace(task.training_settings, **options))
    other.load_state_dict(task.state_dict())
    return other


def gradients_of(network, frames, roads):
    network.zero_grad()
    loss = network.loss(frames, roads if network.config.static else None)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in network.named_parameters()}


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


@pytest.mark.parametrize("cell", ["st-lstm", "convlstm"])
def test_channels_last_from_the_frame_to_the_states_with_the_same_gradients(settings, window, cell):
    frames, roads = (x.double().repeat(2, *[1] * (x.dim() - 1)) for x in window)
    frames[1] = frames[1].flip(-1)
    plain = VideoModelTask(replace(settings.model, cell=cell), settings.training).double()
    task = task_like(plain, channels_last=True).double()
    seen = []
    for module in task.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.extend(x.detach() for x in (*inputs, output)))
    found = gradients_of(task.network, frames, roads)
    assert seen and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert not all(x.is_contiguous() for x in seen)
    assert_same_gradients(found, gradients_of(plain.network, frames, roads), 1e-10)


# --- compiled


@pytest.fixture
def fresh_compiler():
    yield
    torch.compiler.reset()


class Graphs(list):
    """A backend that runs graphs as they are, and keeps them."""

    def __call__(self, module, inputs):
        self.append(module)
        return module


@pytest.mark.parametrize("cell", ["st-lstm", "convlstm"])
def test_compiled_network_has_the_same_gradients_keys_and_forecasts(settings, window, cell, fresh_compiler):
    frames, roads = (x.double() for x in window)
    torch.manual_seed(0)
    model = replace(settings.model, cell=cell, blocks=(1,), strides=(1,), memory_budget="min")
    network = CrevNet(model).double()
    compiled, graphs = copy.deepcopy(network), Graphs()
    compiled.compile_parts(backend=graphs)
    assert list(compiled.state_dict()) == list(network.state_dict())
    expected = gradients_of(network, frames, roads)
    assert_same_gradients(gradients_of(compiled, frames, roads), expected, 1e-10)
    called = [{getattr(n.target, "__name__", "") for n in graph.graph.nodes} & {"run", "run_step"} for graph in graphs]
    # The encoder, the decoder and the predictor, whose first step has zeros that are one tensor and need no gradient
    assert sorted(map(sorted, called)) == [["run"], ["run"], ["run_step"], ["run_step"]]
    copied = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.zero_()  # a copy has parameters of its own

    def train_and_forecast(batch):
        several, maps = frames.repeat(batch, 1, 1, 1, 1), roads.repeat(batch, 1, 1, 1)
        assert_same_gradients(gradients_of(copied, several, maps), expected, 1e-10)
        assert torch.allclose(copied.generate(several[:, :3], maps), network.generate(several[:, :3], maps), rtol=1e-10)

    train_and_forecast(1)
    train_and_forecast(2)
    config = torch._dynamo.config
    limit = config.recompile_limit if hasattr(config, "recompile_limit") else config.cache_size_limit
    assert sum("tanh" in graph.code for graph in graphs) < limit  # at which a part runs uncompiled
    with torch.compiler.set_stance("fail_on_recompile"):
        train_and_forecast(1)
        train_and_forecast(3)


def test_runs_go_on_compiled_and_uncompiled(one_window, window, tmp_path, monkeypatch, fresh_compiler):
    graphs = Graphs()
    monkeypatch.setattr(CrevNet, "compile_parts", partialmethod(CrevNet.compile_parts, backend=graphs))
    counts = []
    for epochs, compiled in ((1, False), (2, True), (3, False)):
        training = replace(one_window.training, epochs=epochs, compile=compiled)
        train(replace(one_window, training=training), tmp_path, resume=epochs > 1)
        counts.append(len(graphs))
    assert counts[0] == 0 and counts[1] == counts[2] > 0
    assert_same_weights(weights(tmp_path), by_hand(one_window, *window, steps=3)[0].state_dict())


@pytest.mark.slow
def test_inductor_s_gradients(settings, window, fresh_compiler):
    torch.manual_seed(0)
    frames, roads = (x.double() for x in window)  # float32's rounding errors differ from processor to processor
    network = CrevNet(replace(settings.model, blocks=(1,), strides=(1,), modules=1)).double()
    compiled = copy.deepcopy(network)
    compiled.compile_parts()
    assert_same_gradients(gradients_of(compiled, frames, roads), gradients_of(network, frames, roads), 1e-10)


def test_same_seed_same_weights_another_seed_others(settings, run, tmp_path):
    train(settings, tmp_path / "again")
    assert_same_weights(weights(tmp_path / "again"), weights(run))
    train(replace(settings, training=replace(settings.training, seed=1)), tmp_path / "other")
    assert any((weights(tmp_path / "other")[k] - v).abs().max() > 1e-2 for k, v in weights(run).items())


# --- data of a run


def test_windows_of_the_chosen_slots_splits_and_strides(settings, points):
    data = replace(
        settings.data, training_slots=(4, 14), stride=2, validation_stride=3, validation_slots=(1, 12), batch_size=1
    )
    cities = CityData(data, settings.model)
    starts = [(b["city"][0], b["date"][0], int(b["start"])) for b in cities.training_batches()]
    days = [("Here", "20180101"), ("Here", "20180102"), ("There", "20180101")]
    assert sorted(starts) == [(*day, s) for day in days for s in (4, 6, 8)]
    assert starts != sorted(starts)  # shuffled
    in_order = [(b["city"][0], int(b["start"])) for b in cities.validation_batches()]
    assert in_order == [(city, s) for city in ("Here", "There") for s in (1, 4, 7)]
    assert [b["city"][0] for b in cities.validation_batches("There")] == ["There"] * 3
    for batch in cities.validation_batches("Here"):
        expected = np.concatenate([points(0)[4:14], points(1)[4:14]]).any(-1).mean(0)
        np.testing.assert_allclose(batch["road_map"][0, 0].numpy(), expected, rtol=1e-6)
    found = cities.window(cities.validation_days[1], 6)["frames"]
    np.testing.assert_array_equal(found.numpy(), points(4)[6:11].transpose(0, 3, 1, 2) / np.float32(255))


def test_channels_of_the_data_and_the_model_have_to_agree(settings):
    with pytest.raises(DataError, match=r"has 3 channels, but the model has 2.*--model\.channels"):
        CityData(settings.data, replace(settings.model, channels=2))


def test_no_data_folder(settings):
    with pytest.raises(DataError, match=r"--data\.root"):
        CityData(DataSettings(), settings.model)
