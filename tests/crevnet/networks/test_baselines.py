"""What holds for every baseline: sizes, gradients, any frame size, true frames in training, predicted ones after it, errors."""

import pytest
import torch
from baseline_nets import MAPPED, TASK, TINY, full_size, make, window
from torch.nn import functional as F

import revflow
from crevnet import MODELS, make_network
from crevnet.networks.shapes import mean_squared_error

RECURRENT = ["convlstm", "predrnn", "predrnnpp", "prednet"]
PATCHED = ["convlstm", "predrnn", "predrnnpp"]
MEAN_SQUARED = [*RECURRENT, "unet"]


def count(model):
    return sum(p.numel() for p in model.parameters())


# --- sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [("convlstm", 11.5), ("predrnn", 23.5), ("predrnnpp", 35.0), ("vpn", 29.9), ("prednet", 6.9), ("unet", 31.1)],
)
def test_parameters_in_the_papers_sizes(name, millions):
    assert round(count(full_size(name, **({"patch": 1} if name in PATCHED else {}))) / 1e6, 1) == millions


def test_every_baseline_is_tested():
    assert list(MODELS) == ["crevnet", *TINY]


# --- training


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
def test_gradients_reach_every_parameter(name, task):
    net = make(name, task)
    net.loss(*window(task)).backward()
    for parameter, value in net.named_parameters():
        assert value.grad is not None and value.grad.abs().max() > 0, parameter


@pytest.mark.parametrize("name", TINY)
def test_training_lowers_the_loss(name):
    net = make(name).float()
    points = torch.zeros(4, 5, 2, 8, 8)
    for t in range(5):
        for b in range(4):
            points[b, t, :, (b + t) % 8, (2 * b + t) % 8] = 1
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = net.loss(points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", MEAN_SQUARED)
@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
def test_loss_is_the_mean_over_all_predictions(name, task):
    net = make(name, task)
    frames, roads = window(task)
    if name == "unet":
        expected = (net(frames[:, :3], roads) - frames[:, 3:]).square().mean()
    else:
        expected = (net(frames[:, :-1], roads) - frames[:, 1:]).square().mean()
    torch.testing.assert_close(net.loss(frames, roads), expected)


@pytest.mark.parametrize("name", RECURRENT)
def test_predictions_are_made_from_true_frames_up_to_their_own(name):
    net = make(name)
    frames, _ = window(steps=4)
    frames.requires_grad_()
    predictions = net(frames)
    for t in range(4):
        (gradient,) = torch.autograd.grad(predictions[:, t].sum(), frames, retain_graph=True)
        reached = gradient.abs().amax((0, 2, 3, 4)) > 0
        assert reached.tolist() == [s <= t for s in range(4)]


@pytest.mark.parametrize(("name", "layer", "beside"), [("convlstm", 7, 0), ("predrnn", 11, 0), ("predrnnpp", 12, 3)])
def test_what_a_step_keeps_for_backward(name, layer, beside):
    """Each nonlinearity's result and each state, once: in tensors of a layer's size, a layer and beside the layers."""

    def kept(steps):
        def step():
            net = make_network(MODELS[name].config(channels=1, static=(), patch=1))
            return net, net.loss(torch.rand(1, steps, 1, 16, 16))

        return revflow.measure_memory(step, predict=True).kept

    pixels = 4 * 16 * 16
    given, seen, predicted = pixels, pixels, pixels
    assert kept(4) - kept(3) == (4 * layer + beside) * 128 * pixels + given + seen + predicted


def test_an_error_s_buffer_is_one_number():
    predictions, truth = torch.rand(2, 1, 3, 8, 8).unbind()
    assert mean_squared_error(predictions.requires_grad_(), truth).untyped_storage().nbytes() == 4


# --- any size


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
@pytest.mark.parametrize("size", [(7, 9), (4, 1)])
def test_frames_are_padded_with_zeros_at_the_bottom_and_the_right(name, task, size):
    net = make(name, task)
    multiple = {"prednet": 4, "unet": 4}.get(name, 1)
    frames, roads = window(task, steps=3, height=size[0], width=size[1])
    padding = (0, -size[1] % multiple, 0, -size[0] % multiple)
    found = net(frames, roads)
    expected = net(F.pad(frames, padding), None if roads is None else F.pad(roads, padding))
    assert found.shape[-2:] == size
    torch.testing.assert_close(found, expected[..., : size[0], : size[1]])


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize(("patch", "size"), [(2, (6, 4)), (2, (5, 3)), (4, (6, 5))])
def test_patches_are_channels(name, patch, size):
    """A model of patches is the model of single pixels, of as many channels, on rearranged frames."""
    net, other = make(name, patch=patch), make(name, {**TASK, "channels": 2 * patch**2})
    other.load_state_dict(net.state_dict())
    frames, _ = window(steps=3, height=size[0], width=size[1])
    whole = F.pad(frames, (0, -size[1] % patch, 0, -size[0] % patch))
    offsets = [(c, i, j) for c in range(2) for i in range(patch) for j in range(patch)]
    predictions = other(torch.stack([whole[:, :, c, i::patch, j::patch] for c, i, j in offsets], 2))
    expected = torch.zeros_like(whole)
    for k, (c, i, j) in enumerate(offsets):
        expected[:, :, c, i::patch, j::patch] = predictions[:, :, k]
    torch.testing.assert_close(net(frames), expected[..., : size[0], : size[1]])


# --- generation


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("task", [TASK, MAPPED], ids=["plain", "mapped"])
def test_generated_frames_are_predicted_from_generated_frames(name, task):
    net = make(name, task)
    past, roads = window(task, steps=3, height=7)
    generated = net.generate(past, roads, horizon=4)
    assert generated.shape == (2, 4, 2, 7, 5) and not generated.requires_grad
    for k in range(4):
        seen = torch.cat((past, generated[:, :k]), 1)
        torch.testing.assert_close(generated[:, k], net(seen, roads)[:, -1])


@pytest.mark.parametrize("name", TINY)
def test_horizon_is_the_task_s_unless_given(name):
    net = make(name).eval()
    past, _ = window(steps=3, height=2, width=2, batch=1)
    whole = net.generate(past)
    assert whole.shape[1] == 2
    torch.testing.assert_close(net.generate(past, horizon=1), whole[:, :1])


@pytest.mark.parametrize("name", TINY)
def test_nothing_is_kept_between_calls(name):
    net = make(name).eval()
    frames, _ = window()
    first = net.loss(frames)
    net.generate(window(steps=3, seed=5, batch=1, height=2, width=2)[0])
    assert torch.equal(net.loss(frames), first)


# --- the road map


@pytest.mark.parametrize("name", TINY)
def test_static_channels_are_seen_and_not_predicted(name):
    net = make(name, MAPPED)
    frames, roads = window(MAPPED, steps=3)
    roads.requires_grad_()
    predictions = net(frames, roads)
    assert predictions.shape[2] == 2
    (gradient,) = torch.autograd.grad(predictions[:, -1].square().sum(), roads)
    assert (gradient.abs() > 0).float().mean() > 0.9


# --- errors


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"channels": 0}, "channels has to be at least 1, not 0"),
        ({"past": 0}, "past has to be at least 1, not 0"),
        ({"horizon": -1}, "horizon has to be at least 1, not -1"),
        ({"patch": 0}, "patch has to be at least 1, not 0"),
    ],
)
def test_tasks_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=message):
        MODELS["convlstm"].config(**option)


@pytest.mark.parametrize("name", PATCHED)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"hidden": 0}, "hidden has to be at least 1, not 0"),
        ({"layers": 0}, "layers has to be at least 1, not 0"),
        ({"kernel": 4}, "kernel must be odd and at least 1, not 4"),
    ],
)
def test_layers_that_cannot_be(name, option, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name].config(**option)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("method", ["__call__", "loss", "generate"])
def test_frames_and_static_channels_that_are_not_the_task_s(name, method):
    frames, roads = window(MAPPED)
    plain, mapped = getattr(make(name, TASK), method), getattr(make(name, MAPPED), method)
    for wrong in (frames[0], frames[:, :, :1]):
        with pytest.raises(ValueError, match=r"frames have to be \(batch, time, 2 channels, height, width\); got"):
            plain(wrong)
    with pytest.raises(ValueError, match="this model takes no static channels"):
        plain(frames, roads)
    with pytest.raises(ValueError, match="this model takes 1 static channels"):
        mapped(frames)
    with pytest.raises(ValueError, match=r"static has to be \(2, 1, 6, 5\) for these frames; got \(2, 1, 5, 5\)"):
        mapped(frames, roads[:, :, 1:])
    with pytest.raises(ValueError, match="frames have to be"):
        plain(frames[:, :0])


@pytest.mark.parametrize("name", TINY)
def test_lengths_that_cannot_be(name):
    net = make(name)
    frames, _ = window(steps=3)
    with pytest.raises(ValueError, match="horizon has to be at least 1, not 0"):
        net.generate(frames, horizon=0)
    with pytest.raises(ValueError, match=r"frames have to be .* in time.*; got 1"):
        net.loss(frames[:, :1])


def test_unet_takes_the_task_s_number_of_frames():
    net = make("unet")
    with pytest.raises(ValueError, match="frames must have 3 time steps for this model; got 2"):
        net(torch.rand(1, 2, 2, 4, 4).double())
    with pytest.raises(ValueError, match="frames must have 5 time steps for this model; got 4"):
        net.loss(torch.rand(1, 4, 2, 4, 4).double())
