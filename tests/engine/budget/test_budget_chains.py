"""The promise: whatever the chain, no step takes more than its budget, or the least it needs, and one transient."""

import random

import pytest
import torch
from torch import nn

import revflow
from engine.nets import Scale, edge_to, image

KINDS = [(revflow.AdditiveCoupling, 1), (revflow.AffineCoupling, 2), (revflow.GatedCoupling, 2)]
SHARES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


class Several(nn.Module):
    """Its layers, and their result in so many parts."""

    def __init__(self, layers, outputs):
        super().__init__()
        self.layers, self.outputs = nn.Sequential(*layers), outputs

    def forward(self, x):
        out = 0.1 * self.layers(x)
        return out if self.outputs == 1 else out.chunk(self.outputs, 1)


def conditioner(choose, channels, outputs):
    width = choose.choice([1, 4, 8, 24])
    inside = choose.choice([
        [],
        [nn.GroupNorm(1, width)],
        [nn.BatchNorm2d(width)],
        [nn.Dropout(0.3)],
        [nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, width, 1), nn.Sigmoid()],
    ])  # fmt: skip
    end = choose.choice([[], [nn.Tanh()]])
    first = nn.Conv2d(channels, width, choose.choice([1, 3]), padding="same")
    return Several([first, *inside, nn.SiLU(), nn.Conv2d(width, outputs * channels, 1), *end], outputs)


def blocks_of(choose, channels, height, exact):
    """Blocks of very different sizes: streams keep their bytes when they are unshuffled, conditioners do not."""
    blocks = []
    for _ in range(choose.randint(1, 8)):
        kind = choose.random()
        if kind < 0.15 and height % 2 == 0 and height > 4:
            blocks.append(revflow.PixelUnshuffle(2))
            channels, height = 4 * channels, height // 2
        elif kind < 0.22 and not exact:
            blocks.append(Scale())
        else:
            coupling, outputs = choose.choice(KINDS)
            count = choose.choice([1, 1, 2])
            blocks.append(coupling(*[conditioner(choose, channels, outputs) for _ in range(count)]))
    return blocks


def random_chain(seed):
    """(a sequence, its input)."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    joined, exact, chunks = choose.random() < 0.6, choose.random() < 0.3, choose.choice([1, 1, 1, 2, 3])
    channels, height = choose.choice([(2, 16), (4, 8), (1, 24), (2, 24)])
    blocks = blocks_of(choose, channels, height, exact)
    net = revflow.ReversibleSequence(blocks, exact=exact, chunks=chunks, guard="off")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and chunks > 1:
            module.eval()
    shape, grad = (3, channels, height, height), choose.random() < 0.7
    streams = tuple(image(*shape, dtype=torch.float32, seed=k).requires_grad_(grad) for k in (1, 2))
    return net, torch.cat(streams, 1).detach().requires_grad_(grad) if joined else streams


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def peak_of(net, x, seeds):
    """Of the chain alone: the loss has none of its own, and nobody holds the output."""
    for leaf in (*net.parameters(), *as_tuple(x)):
        leaf.grad = torch.zeros_like(leaf)

    def step():
        y = as_tuple(net(x))
        edges = [edge_to(s) for s in y]
        del y
        torch.autograd.backward(edges, seeds)

    return revflow.measure_memory(step).peak


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_no_chain_takes_more_than_it_was_given(seed):
    net, x = random_chain(seed)
    if not any(t.requires_grad for t in (*as_tuple(x), *net.parameters())):
        pytest.skip("nothing to train")
    with torch.no_grad():
        seeds = [torch.randn_like(s) for s in as_tuple(net(x))]
    net.memory_budget = "max"
    most = net.plan(x).peak
    net.memory_budget = 0
    least = net.plan(x).peak
    # Beside .grad there are, for a moment, one block's gradients; those of a slice, and the slices' before it.
    own = max(sum(p.nbytes for p in block.parameters()) for block in net) * min(net.chunks, 2)
    for share in SHARES:
        net.memory_budget = budget = int(least + share * (most - least))
        measuring = peak_of(net, x, seeds)
        plan, found = net.plan(x), peak_of(net, x, seeds)
        assert plan.peak <= max(budget, least)
        assert max(measuring, found) <= max(budget, least) + plan.transient + own, (share, plan.kept)
    assert plan.kept == len(net) or most < least  # below the need everything is recomputed


class Middle(nn.Module):
    """A conditioner whose hidden values take 8 streams."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8 * channels, 1), nn.Tanh(), nn.Conv2d(8 * channels, channels, 1)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("huge_first", [True, False])
def test_blocks_of_very_different_sizes(huge_first):
    """An i-RevNet whose streams shrink, and the reverse."""
    torch.manual_seed(0)

    class Narrow(Middle):
        """Of a stream's sixteenth."""

        def forward(self, x):
            return super().forward(x[..., :4, :4]).repeat(1, 1, 4, 4)

    large, small = (
        [revflow.AdditiveCoupling(Middle(2)) for _ in range(3)],
        [revflow.AdditiveCoupling(Narrow(2)) for _ in range(5)],
    )
    net = revflow.ReversibleSequence(large + small if huge_first else small + large, guard="off")
    x = image(2, 4, 16, 16, dtype=torch.float32).requires_grad_()
    seeds = [torch.ones_like(x)]
    net.memory_budget = "max"
    most = net.plan(x).peak
    net.memory_budget = "min"
    least = net.plan(x).peak
    kept = set()
    for share in SHARES:
        net.memory_budget = budget = int(least + share * (most - least))
        measuring = peak_of(net, x, seeds)
        plan = net.plan(x)
        assert max(measuring, peak_of(net, x, seeds)) <= budget + plan.transient
        kept.add(plan.kept)
    assert len(kept) > 3
