"""predict_memory on what training steps contain: each step's predicted peak is that of a real step of the same size."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.checkpoint import checkpoint

import revflow

STEPS = {}


def case(step):
    STEPS[step.__name__] = step
    return step


def train(net, x, optimizer=None):
    net(x).square().mean().backward()
    if optimizer is not None:
        optimizer.step()


@case
def to_bfloat16(batch):
    train(nn.Linear(4, 4).to(torch.bfloat16), torch.randn(batch, 4, dtype=torch.bfloat16))


@case
def double(batch):
    train(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double(), torch.randn(batch, 4, dtype=torch.float64))


@case
def to_the_same_device(batch):
    train(nn.Linear(4, 4).to("cpu"), torch.randn(batch, 4))


@case
def converted_after_the_backward_pass(batch):
    net = nn.Linear(4, 4)
    train(net, torch.randn(batch, 4))
    net.half()


@case
def rates_that_are_read(batch):
    """Stochastic depth: the first layer's rate is 0, and it drops nothing."""
    rates = torch.linspace(0, 0.5, 4).tolist()
    train(
        nn.Sequential(*[layer for p in rates for layer in (nn.Linear(4, 4), nn.Dropout(p) if p else nn.Identity())]),
        torch.randn(batch, 4),
    )


@case
def rates_that_are_items(batch):
    rates = [rate.item() for rate in torch.linspace(0, 0.5, 4)]
    train(
        nn.Sequential(*[nn.Dropout(p) if p else nn.Identity() for p in rates], nn.Linear(4, 4)), torch.randn(batch, 4)
    )


@case
def truncated_normal(batch):
    net = nn.Linear(4, 4)
    nn.init.trunc_normal_(net.weight, std=0.02)
    train(net, torch.randn(batch, 4))


@case
def truncated_normal_of_a_tail(batch):
    net = nn.Linear(4, 4)
    nn.init.trunc_normal_(net.weight, std=0.02, a=1e-9, b=0.001)
    train(net, torch.randn(batch, 4))


@case
def logged_loss(batch):
    loss = nn.Linear(4, 4)(torch.randn(batch, 4)).square().mean()
    loss.backward()
    text = f"{loss.item():.3f} {loss.detach():.3f} {float(loss.detach())}"
    assert math.isfinite(loss.item()), text


@case
def clipped_adamw(batch):
    net = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, torch.randn(batch, 4))
    nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_optimizers(kind, options):
    def step(batch):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        optimizer = kind(net.parameters(), lr=0.1, **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for _ in range(3):
            optimizer.zero_grad()
            train(net, torch.randn(batch, 4), optimizer)
            scheduler.step()

    agrees(step)


@case
def attention(batch):
    x = torch.randn(batch, 5, 8)
    nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x, need_weights=False)[0].sum().backward()


@case
def encoder(batch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    train(nn.TransformerEncoder(layer, 2), torch.randn(batch, 5, 8))


@case
def encoder_with_a_causal_mask(batch):
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    net(torch.randn(batch, 5, 8), mask=mask).sum().backward()


@case
def autocast(batch):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(batch, 4)).sum().backward()


@case
def initialized_parameter(batch):
    weight = nn.Parameter(torch.empty(4, 4))
    nn.init.normal_(weight)
    (torch.randn(batch, 4) @ weight).sum().backward()


@case
def parameters_of_known_values(batch):
    scale, shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(1, 4))
    optimizer = torch.optim.Adam([scale, shift])
    for _ in range(2):
        optimizer.zero_grad()
        (torch.randn(batch, 4) * scale + shift).square().sum().backward()
        optimizer.step()


@case
def scaled_gradients(batch):
    scaler, net = torch.amp.GradScaler("cpu"), nn.Linear(4, 4)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(batch, 4)).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@case
def checkpointed(batch):
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3))
    x = torch.randn(batch, 4)
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)
    x.sum().backward()


@case
def language_model(batch):
    """Positions, a causal mask, an embedding and a cross-entropy, as in the transformers library."""
    length, width, words = 6, 8, 11
    embedding, positions = nn.Embedding(words, width), nn.Embedding(length, width)
    attend, head = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, words)
    tokens = torch.randint(0, words, (batch, length))
    index = torch.arange(length)
    assert int(index.max()) < length
    mask = torch.full((length, length), float("-inf"))
    mask = torch.where(index[:, None] >= index, 0.0, mask)
    mask[0, 0] = 0.0
    x = embedding(tokens) + positions(index.unsqueeze(0).expand(batch, length))
    x = attend(x, x, x, attn_mask=mask, need_weights=False)[0]
    logits = head(x)
    nn.functional.cross_entropy(logits[:, :-1].reshape(-1, words), tokens[:, 1:].reshape(-1)).backward()


@case
def padding(batch):
    lengths = torch.full((batch,), 3)
    mask = torch.arange(5)[None, :] < lengths[:, None]
    scores = nn.Linear(4, 5)(torch.randn(batch, 4)).masked_fill(~mask, float("-inf"))
    scores.softmax(-1).sum().backward()


@case
def normalized(batch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(torch.randn(batch, 3, 8, 8)), torch.randint(0, 3, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@case
def lstm(batch):
    """Without oneDNN, whose LSTM stores a buffer that fake tensors do not have."""
    with torch.backends.mkldnn.flags(enabled=False):
        net = nn.LSTM(4, 8, batch_first=True)
        net(torch.randn(batch, 5, 4))[0].sum().backward()


@case
def gru(batch):
    net = nn.GRU(4, 8, 2, batch_first=True, bidirectional=True)
    net(torch.randn(batch, 5, 4))[0].sum().backward()


@case
def averaged(batch):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(net).requires_grad_(False)
    x = torch.randn(batch, 4)
    (net(x) - teacher(x)).square().mean().backward()
    with torch.no_grad():
        for mean, value in zip(teacher.parameters(), net.parameters(), strict=True):
            mean.mul_(0.9).add_(value, alpha=0.1)


@case
def sampled_from_a_distribution(batch):
    mean, scale = nn.Linear(4, 8)(torch.randn(batch, 4)).chunk(2, 1)
    posterior = torch.distributions.Normal(mean, scale.exp())
    prior = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
    (posterior.rsample().sum() + torch.distributions.kl_divergence(posterior, prior).sum()).backward()


@case
def from_a_meta_network(batch):
    with torch.device("meta"):
        net = nn.Linear(4, 4)
    net.to_empty(device="cpu")
    train(net, torch.randn(batch, 4))


@case
def repeated_constants(batch):
    (torch.eye(3).repeat(batch, 1, 1) + torch.arange(3.0).expand(batch, 3, 3).contiguous()).sum()
    torch.tensor(1.0).new_zeros(batch, 4)


def agrees(step):
    memory = revflow.predict_memory(step)
    for batch in (2, 8):
        assert memory.peak(batch) == revflow.measure_memory(lambda batch=batch: step(batch)).peak > 0
    assert revflow.measure_memory(lambda: step(4), predict=True).peak == memory.peak(4)


@pytest.mark.parametrize("name", STEPS)
def test_the_predicted_peak_is_that_of_a_real_step(name):
    agrees(STEPS[name])


def outside(make):
    """A trained network with gradients, its optimizer with state, a scheduler and a GradScaler, as a step finds them."""
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler, scaler = torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.randn(4, 8)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    return net, optimizer, scheduler, scaler


def state(net, optimizer, scheduler, scaler):
    states = [net.state_dict(), optimizer.state_dict(), scheduler.state_dict(), scaler.state_dict()]
    gradients = [p.grad for p in net.parameters()]
    attributes = [(m.training, list(vars(m))) for m in net.modules()]
    flags = [(id(p), type(p), p.requires_grad, p._version) for p in net.parameters()]
    return copy.deepcopy((states, gradients, attributes, flags, torch.get_rng_state()))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return type(first) is type(second) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8)),
    "reversible": lambda: revflow.ReversibleSequence(
        [revflow.AdditiveCoupling(nn.Linear(4, 4)) for _ in range(3)], guard="off"
    ),
}


def ordinary(batch, net, optimizer, scheduler, scaler):
    optimizer.zero_grad()
    scaler.scale(net(torch.randn(batch, 8)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()


def accumulated(batch, net, optimizer, scheduler, scaler):
    del scheduler, scaler
    for _ in range(2):
        net(torch.randn(batch, 8)).square().mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def averaged_outside(batch, net, optimizer, scheduler, scaler):
    del optimizer, scheduler, scaler
    teacher = copy.deepcopy(net).requires_grad_(False).eval()
    x = torch.randn(batch, 8)
    (net(x) - teacher(x)).square().mean().backward()


def frozen(batch, net, optimizer, scheduler, scaler):
    del optimizer, scheduler, scaler
    torch.manual_seed(7)
    net.eval()
    next(net.parameters()).requires_grad_(False)
    net(torch.randn(batch, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("run", [ordinary, accumulated, averaged_outside, frozen], ids=lambda run: run.__name__)
@pytest.mark.parametrize("make", NETS)
def test_a_network_outside_of_the_step_stays_as_it_is(make, run):
    objects = outside(NETS[make])
    before = state(*objects)
    memory = revflow.predict_memory(lambda batch: run(batch, *objects))
    assert same(state(*objects), before)
    predicted = revflow.measure_memory(lambda: run(8, *objects), predict=True)
    assert same(state(*objects), before)
    assert predicted.peak == memory.peak(8)
    # A real run also counts the storages of outside buffers that it copies.
    copied = sum(b.nbytes for b in objects[0].buffers()) if run is averaged_outside else 0
    for batch in (2, 8):
        twins = outside(NETS[make])
        assert memory.peak(batch) + copied == revflow.measure_memory(lambda b=batch, t=twins: run(b, *t)).peak > 0


def stepping_in_the_backward_pass():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = {p: torch.optim.Adam([p], foreach=False) for p in net.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    return lambda batch: net(torch.randn(batch, 4)).sum().backward()


def averaging():
    """The average's first update, which a counter with data selects, copies the parameters."""
    net = nn.Linear(4, 4)
    average = torch.optim.swa_utils.AveragedModel(net)

    def step(batch):
        net(torch.randn(batch, 4)).sum().backward()
        for _ in range(2):
            average.update_parameters(net)

    return step


def scaled_embedding():
    net = nn.Embedding(10, 4, max_norm=1.0)
    return lambda batch: net(torch.randint(10, (batch, 3))).sum().backward()


def stored_samples():
    x, y, net = torch.randn(64, 4), torch.randint(3, (64,)), nn.Linear(4, 3)

    def step(batch):
        index = torch.randint(64, (batch,))
        nn.functional.cross_entropy(net(x[index]), y[index], label_smoothing=0.1).backward()
        assert int(y.max()) < 3

    return step


def loaded_state():
    net = nn.Linear(4, 4)

    def step(batch):
        net(torch.randn(batch, 4)).sum().backward()
        net.load_state_dict(nn.Linear(4, 4).state_dict())

    return step


@pytest.mark.parametrize(
    "make",
    [stepping_in_the_backward_pass, averaging, scaled_embedding, stored_samples, loaded_state],
    ids=lambda make: make.__name__,
)
def test_more_steps_with_networks_outside(make):
    memory = revflow.predict_memory(make())
    for batch in (2, 8):
        step = make()
        assert memory.peak(batch) == revflow.measure_memory(lambda b=batch, run=step: run(b)).peak > 0


def test_a_converted_network_outside_of_the_step_stays_as_it_is():
    net = nn.Linear(8, 8)
    parameters = dict(net.named_parameters())

    def step(batch):
        net.double()(torch.randn(batch, 8, dtype=torch.float64)).sum().backward()

    memory = revflow.predict_memory(step)
    assert dict(net.named_parameters()) == parameters
    assert all(p is parameters[name] and p.grad is None for name, p in net.named_parameters())
    assert memory.peak(4) == revflow.measure_memory(lambda: step(4)).peak


def test_a_network_outside_of_a_step_that_fails_stays_as_it_is():
    objects = outside(NETS["mlp"])
    before = state(*objects)

    def step(batch):
        ordinary(batch, *objects)
        raise KeyError("the step")

    with pytest.raises(KeyError, match="the step"):
        revflow.predict_memory(step)
    assert same(state(*objects), before)


def test_a_network_on_the_meta_device():
    net = nn.Linear(8, 8, device="meta")
    memory = revflow.predict_memory(lambda batch: net(torch.randn(batch, 8, device="meta")).sum().backward())
    assert memory.peak(4) == 0  # the meta device has no memory


def branch_on_the_loss(batch):
    loss = nn.Linear(4, 4)(torch.randn(batch, 4)).sum()
    if torch.isnan(loss):  # the line
        raise ValueError
    loss.backward()


def count(batch):
    return torch.zeros(int(torch.randint(5, (batch,)).max()))  # the line


def listed(batch):
    return torch.randint(5, (batch,))[:3].tolist()  # the line


def selected(batch):
    x = torch.randn(batch, 4)
    return x[x > 0]  # the line


def nonzero(batch):
    return torch.randn(batch).nonzero()  # the line


def array(batch):
    return torch.randn(batch).numpy()  # the line


def within_a_block(batch):
    class Selects(nn.Module):
        def forward(self, x):
            return x * bool((x > 0).all())  # the line

    revflow.ReversibleSequence([revflow.AdditiveCoupling(Selects())])(torch.randn(batch, 4))


@pytest.mark.parametrize(
    "step", [branch_on_the_loss, count, listed, selected, nonzero, array, within_a_block], ids=lambda s: s.__name__
)
def test_what_cannot_be_known_is_an_error_at_the_users_line(step):
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    start = step.__code__.co_firstlineno - 1
    line = next(i for i in range(start, len(lines)) if lines[i].endswith("# the line"))
    with pytest.raises(RuntimeError, match="cannot be predicted") as caught:
        revflow.predict_memory(step)
    assert f"{__file__}, line {line + 1}: `{lines[line].strip()}`" in str(caught.value)
    assert "To predict the memory, " in str(caught.value)


def test_errors_of_the_step_itself_pass():
    with pytest.raises(RuntimeError, match=r"reduction dim|multiplied"):
        revflow.predict_memory(lambda batch: torch.randn(batch, 3) @ torch.randn(4, 4))


def test_afterwards_tensors_are_copied_and_converted_as_before():
    functions = torch.utils.swap_tensors, torch.Tensor.__deepcopy__, torch.Tensor.__format__
    revflow.predict_memory(to_bfloat16)
    assert functions == (torch.utils.swap_tensors, torch.Tensor.__deepcopy__, torch.Tensor.__format__)


def test_tensors_of_transforms_are_left_alone():
    """They have no data of their own, and outlive a transform if something holds them."""
    held = []

    def square(x):
        held.append(x)
        return x.square()

    torch.func.vjp(square, torch.ones(3))
    assert revflow.predict_memory(lambda batch: torch.zeros(batch, 256)).peak(1) == 1024
    assert len(held) == 1


def test_traced_tensors_of_symbolic_sizes_are_left_alone():
    """A compiled network with a dynamic dimension may hold them, and errors in a step's end leave networks without data."""
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(3, 4), symbolic_context=sizes)
    held = torch._to_functional_tensor(fake)
    assert type(held) is torch.Tensor
    layer = nn.Linear(4, 4)
    before = layer.weight.data_ptr()
    assert revflow.predict_memory(lambda batch: layer(torch.zeros(batch, 4))).peak(1) > 0
    assert layer.weight.data_ptr() == before
    del held
