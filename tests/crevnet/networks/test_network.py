"""CrevNet: its sizes, losses and forecasts, against the paper's, single steps written out, and ordinary autograd."""

import pytest
import torch
from small_crevnets import NO_MAP, SMALL, assert_slopes, gradients, make, padded, plain, random, relative, window

import revflow
from crevnet import PRESETS, CrevNet, CrevNetConfig, TwoWayAutoencoder

# --- sizes


@pytest.mark.parametrize(
    ("preset", "autoencoder", "predictor"),
    [("authors", 2_362_424, 331_920_384), ("paper", 3_780_020, 442_560_512)],
)
def test_parameters_as_counted_from_the_authors_code(preset, autoencoder, predictor):
    with torch.device("meta"):
        model = CrevNet(PRESETS[preset])
    assert sum(p.numel() for p in model.autoencoder.parameters()) == autoencoder
    assert sum(p.numel() for p in model.predictor.parameters()) == predictor
    assert sum(p.numel() for p in model.parameters()) == autoencoder + predictor


@pytest.mark.parametrize("preset", ["authors", "paper"])
@pytest.mark.parametrize(("static", "widths"), [(("road_map",), (8, 32, 128, 512)), ((), (6, 24, 96, 384))])
def test_group_widths(preset, static, widths):
    base = PRESETS[preset]
    config = CrevNetConfig(static=static, blocks=base.blocks, strides=base.strides)
    assert config.widths == widths
    with torch.device("meta"):
        autoencoder = TwoWayAutoencoder(config)
        frame = torch.empty(1, config.input_channels, 496, 448)
        z1, z2 = autoencoder.encode(frame)
        assert z1.shape == z2.shape == (1, widths[-1], 31, 28)
        assert autoencoder.decode((z1, z2)).shape == frame.shape
    # the last convolution of each block is as wide as its stage's group, and a quarter of that inside
    last = [list(b.F.parameters())[-1] for b in autoencoder.blocks if isinstance(b, revflow.AdditiveCoupling)]
    expected = [(w, w // 4) for w, count in zip(widths, base.blocks, strict=True) for _ in range(count)]
    if not static:
        expected = [(w, max(w // 4, 1)) for w, _ in expected]
    assert [tuple(w.shape[:2]) for w in last] == expected


def test_presets_are_the_paper_s_and_the_authors():
    paper, authors = PRESETS["paper"], PRESETS["authors"]
    assert (3 * sum(paper.blocks), paper.modules, paper.past, paper.horizon) == (36, 8, 9, 3)
    assert (3 * sum(authors.blocks), authors.modules, authors.past, authors.horizon) == (24, 6, 5, 3)
    assert paper.cell == authors.cell == "st-lstm" and paper.static == authors.static == ("road_map",)
    assert paper.downsampling == authors.downsampling == 16


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"channels": 0}, "channels"),
        ({"bottleneck": 0}, "bottleneck"),
        ({"modules": 0}, "modules"),
        ({"past": 0}, "past"),
        ({"horizon": -1}, "horizon"),
        ({"blocks": ()}, "one entry a stage"),
        ({"blocks": (1, 1)}, "2 and 4 entries"),
        ({"blocks": (1, 0, 1, 1)}, "at least 1"),
        ({"strides": (1, 2, 2, 3)}, "1 or 2"),
        ({"cell": "gru"}, "gru"),
    ],
)
def test_configurations_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=message):
        CrevNetConfig(**option)


# --- the training loss


@pytest.mark.parametrize("config", [SMALL, NO_MAP])
def test_loss_has_the_slopes_of_finite_differences(config):
    model = make(config)
    frames, roads = window(config, batch=1, height=7, width=8)
    assert_slopes(model.named_parameters(), lambda: model.loss(frames, roads))


@pytest.mark.parametrize("config", [SMALL, NO_MAP])
@pytest.mark.parametrize("over", ["all", "future", "padded"])
def test_gradients_of_the_loss(config, over, monkeypatch):
    model = make(config)
    frames, roads = window(config, height=15, width=13)

    def loss():
        return model.loss(frames, roads, over)

    found, value = gradients(model, loss), loss().item()
    plain(monkeypatch)
    expected = gradients(model, loss)
    assert found.keys() == expected.keys() and len(found) >= len(list(model.parameters())) - 2
    assert abs(value - loss().item()) < 1e-12
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-9, name


def predictions_step_by_step(model, frames, roads):
    """The network's predictions for every frame but the first, (T - 1) x (B, Ci, Hp, Wp), and the truth."""
    inputs = padded(frames, roads, model.config.downsampling)
    predictions, state = [], None
    for t in range(frames.shape[1] - 1):
        prediction, state = model.step(inputs[:, t], state)
        predictions.append(prediction)
    return predictions, [inputs[:, t] for t in range(1, frames.shape[1])]


@pytest.mark.parametrize("config", [SMALL, NO_MAP])
@pytest.mark.parametrize("size", [(16, 12), (15, 9)])
def test_losses_from_single_steps(config, size):
    model = make(config)
    frames, roads = window(config, height=size[0], width=size[1])
    with torch.no_grad():
        predictions, truth = predictions_step_by_step(model, frames, roads)
        inside = [
            (p[:, : config.channels, : size[0], : size[1]] - t[:, : config.channels, : size[0], : size[1]]).square()
            for p, t in zip(predictions, truth, strict=True)
        ]
        whole = [(p - t).square().mean() for p, t in zip(predictions, truth, strict=True)]
        means = torch.stack([e.mean() for e in inside])
        future = means[-config.horizon :]
        assert torch.isclose(model.loss(frames, roads), means.mean(), rtol=1e-10, atol=0)
        assert torch.isclose(model.loss(frames, roads, "all"), means.mean(), rtol=1e-10, atol=0)
        assert torch.isclose(model.loss(frames, roads, "future"), future.mean(), rtol=1e-10, atol=0)
        assert torch.isclose(model.loss(frames, roads, "padded"), torch.stack(whole).mean(), rtol=1e-10, atol=0)
        assert means.mean() != future.mean()
    assert len(means) == config.past + config.horizon - 1


@pytest.mark.parametrize("config", [SMALL, NO_MAP])
def test_forward_gives_the_one_step_predictions(config):
    model = make(config)
    frames, roads = window(config, height=15, width=9)
    with torch.no_grad():
        found = model(frames, roads)
        following = torch.cat((frames, frames[:, :1]), 1)  # forward predicts beyond the last frame as well
        predictions, _ = predictions_step_by_step(model, following, roads)
    assert found.shape == frames.shape
    for t, prediction in enumerate(predictions):
        expected = prediction[:, : config.channels, :15, :9]
        torch.testing.assert_close(found[:, t], expected, rtol=1e-10, atol=1e-10)


def test_predictions_depend_on_the_past_alone():
    model = make(SMALL)
    frames, roads = window(SMALL)
    changed = frames.clone()
    changed[:, 3] += 0.5
    with torch.no_grad():
        before, after = model(frames, roads), model(changed, roads)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=1e-11, atol=1e-11)
    assert all((before[:, t] - after[:, t]).abs().max() > 1e-4 for t in (3, 4))


def test_samples_of_a_batch_do_not_meet():
    model = make(SMALL)
    frames, roads = window(SMALL, batch=3)
    with torch.no_grad():
        together = model(frames, roads)
        for k in range(3):
            alone = model(frames[k : k + 1], roads[k : k + 1])
            torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-10, atol=1e-10)


# --- generation


def generated_by_hand(model, past, roads, horizon, feedback):
    """Step by step from the predictor, with the frame put together again where frames are fed back."""
    config = model.config
    inputs = padded(past, roads, config.downsampling)
    state = model.predictor.initial_state(model.autoencoder.encode(inputs[:, 0]))
    for t in range(past.shape[1]):
        latent, state = model.predictor(model.autoencoder.encode(inputs[:, t]), state)
    frames = []
    for _ in range(horizon):
        frame = model.autoencoder.decode(latent)[:, : config.channels, : past.shape[3], : past.shape[4]]
        frames.append(frame)
        if feedback == "frame":
            latent = model.autoencoder.encode(padded(frame[:, None], roads, config.downsampling)[:, 0])
        latent, state = model.predictor(latent, state)
    return torch.stack(frames, 1)


@pytest.mark.parametrize("config", [SMALL, NO_MAP])
@pytest.mark.parametrize("feedback", ["latent", "frame"])
def test_generate_step_by_step(config, feedback):
    model = make(config)
    past, roads = window(config, steps=4, height=15, width=9)
    with torch.no_grad():
        expected = generated_by_hand(model, past, roads, 4, feedback)
    found = model.generate(past, roads, horizon=4, feedback=feedback)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not found.requires_grad
    torch.testing.assert_close(model.generate(past, roads, feedback=feedback), expected[:, : config.horizon])
    if feedback == "latent":
        assert torch.equal(model.generate(past, roads, horizon=4), found)  # the default


def test_feedback_matters_from_the_second_frame_on():
    model = make(SMALL)
    past, roads = window(SMALL, steps=3)
    latent, frame = (model.generate(past, roads, horizon=3, feedback=f) for f in ("latent", "frame"))
    assert torch.equal(latent[:, 0], frame[:, 0])
    assert torch.equal(model.generate(past, roads, 1, "latent"), model.generate(past, roads, 1, "frame"))
    assert all((latent[:, t] - frame[:, t]).abs().max() > 1e-4 for t in (1, 2))


def test_feedback_is_all_one_without_static_channels_and_padding():
    """Encoding undoes decoding, so the two ways differ only by what is put back."""
    model = make(NO_MAP)
    past, _ = window(NO_MAP, steps=3)
    latent, frame = (model.generate(past, horizon=4, feedback=f) for f in ("latent", "frame"))
    assert (latent - frame).abs().max() < 1e-10
    past, _ = window(NO_MAP, steps=3, height=15)
    latent, frame = (model.generate(past, horizon=4, feedback=f) for f in ("latent", "frame"))
    assert (latent - frame).abs().max() > 1e-4


# --- any size, any number of channels


@pytest.mark.parametrize("size", [(37, 29), (1, 1), (16, 16), (17, 32)])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("static", [("road_map",), (), ("clock", "connectivity")])
def test_any_frame_size_and_number_of_channels(size, channels, static):
    config = CrevNetConfig(
        channels=channels, static=static, blocks=(1, 1, 1), strides=(1, 2, 2), modules=1, past=2, horizon=1
    )
    model = make(config, dtype=torch.float32)
    frames = random(1, 3, channels, *size, dtype=torch.float32)
    roads = random(1, config.static_channels, *size, seed=1, dtype=torch.float32) if static else None
    assert model(frames, roads).shape == frames.shape
    for feedback in ("latent", "frame"):
        assert model.generate(frames, roads, 2, feedback).shape == (1, 2, channels, *size)
    for over in ("all", "future", "padded"):
        assert model.loss(frames, roads, over).isfinite()


def test_padding_is_zeros_at_the_bottom_and_the_right():
    model = make(SMALL)
    frames, roads = window(SMALL, height=13, width=10)
    with torch.no_grad():
        found = model(frames, roads)
        larger = padded(frames, roads, 4)
        whole = model(larger[:, :, :3], larger[:, 0, 3:])
    assert larger.shape[-2:] == (16, 12)
    torch.testing.assert_close(found, whole[..., :13, :10], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("call", ["forward", "loss", "generate"])
@pytest.mark.parametrize(
    ("frames", "roads", "message"),
    [
        ((2, 5, 3, 8, 8), None, "takes 1 static channels"),
        ((2, 5, 2, 8, 8), (2, 1, 8, 8), r"3 channels.*\(2, 5, 2, 8, 8\)"),
        ((5, 3, 8, 8), (2, 1, 8, 8), r"frames have to be.*\(5, 3, 8, 8\)"),
        ((2, 5, 3, 8, 8), (1, 1, 8, 8), r"static has to be \(2, 1, 8, 8\).*\(1, 1, 8, 8\)"),
        ((2, 5, 3, 8, 8), (2, 8, 8), r"static has to be"),
        ((2, 5, 3, 8, 8), (2, 1, 8, 9), r"static has to be"),
    ],
)
def test_wrong_shapes_say_what_was_expected(call, frames, roads, message):
    model = make(SMALL, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(torch.zeros(frames), None if roads is None else torch.zeros(roads))


def test_static_channels_too_many():
    with pytest.raises(ValueError, match="takes no static channels"):
        make(NO_MAP).generate(random(1, 3, 2, 8, 8), random(1, 1, 8, 8))


def test_generated_loss_is_that_of_the_frames_that_generate_gives():
    """Teacher-forced up to the last past frame, and from there on exactly what `generate` predicts."""
    torch.manual_seed(0)
    model = CrevNet(CrevNetConfig(blocks=(1,), strides=(2,), modules=2, past=3, horizon=3)).double()
    frames, roads = torch.rand(2, 6, 3, 13, 10, dtype=torch.float64), torch.rand(2, 1, 13, 10, dtype=torch.float64)
    one_step = model(frames[:, :3], roads)[:, :2]
    predictions = torch.cat((one_step, model.generate(frames[:, :3], roads)), 1)
    expected = (predictions - frames[:, 1:]).square().mean()
    loss = model.loss(frames, roads, fed=[False, False])
    assert abs(loss.item() - expected.item()) < 1e-12
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
