"""A larger budget never leads to more work, and a smaller one never to a higher peak."""

import random

import pytest
import torch
from torch import nn

import revflow
from engine.budget.test_budget_chains import KINDS, conditioner
from engine.budgets import HUGE, limited, transient_of
from engine.nets import Scale, edge_to, image
from revflow._budget.costs import Choice, Cost, SequenceMenu
from revflow._budget.selection import planned
from revflow._budget.step_costs import CellCost, Handling, Inputs, StepMenu

# Of random costs


def random_cost(choose, k):
    streams = choose.choice([8, 16, 32])
    graph, work = choose.randint(0, 400), choose.randint(1, 1000)
    gradient = choose.randint(0, max(graph, 1))
    output = choose.choice([0, choose.randint(1, 60)])
    return Cost(
        str(k),
        "A",
        graph=graph,
        made=choose.choice([0, streams // 2, streams]),
        inputs=streams,
        outputs=streams,
        unsaved=choose.choice([0, streams]),
        anchors=choose.choice([0, 0, streams]),
        transient=choose.choice([0, graph // 2, graph]) + gradient,
        gradient=gradient,
        work=work,
        output=output,
        spared=choose.randint(1, work) if output else 0,
    )


def random_menu(choose):
    if choose.random() < 0.3:
        cells = [CellCost(*[choose.randint(1, 300) for _ in range(6)]) for _ in range(choose.randint(1, 3))]
        ways = [Handling(1, 0, 0), Handling(0.5, 2, 0), Handling(0, 3, 0), Handling(1 / 3, 3, 2 / 3)]
        return StepMenu(cells, Inputs(choose.choice([8, 32]), choose.random() < 0.5), choose.choice(ways))
    costs = [random_cost(choose, k) for k in range(choose.randint(1, choose.choice([2, 8, 30])))]
    return SequenceMenu(costs, choose.random() < 0.5, choose.random() < 0.3)


def peak_by_hand(options, carried):
    """Backwards: while one call runs, all earlier ones hold what they hold."""
    return carried + max(
        sum(earlier.held for earlier in options[:number]) + option.peak for number, option in enumerate(options)
    )


@pytest.mark.parametrize("seed", range(40))
def test_plans_of_random_costs(seed):
    choose = random.Random(seed)
    kinds = [random_menu(choose) for _ in range(choose.randint(1, 4))]
    menus = [choose.choice(kinds) for _ in range(choose.choice([1, 2, 5, 12]))]
    everything, least = planned(menus, HUGE), tuple(menu.least for menu in menus)
    assert everything.spared == sum(menu.most.spared for menu in menus)
    carried = max(menu.carried for menu in menus)
    top = int(1.1 * max(everything.peak, peak_by_hand(least, 0)))
    before = None
    for budget in sorted(choose.randint(0, top) for _ in range(200)):
        plan = planned(menus, budget)
        need = peak_by_hand(least, carried)
        assert plan.peak == max(peak_by_hand(plan.options, carried), need)
        assert plan.spared == sum(option.spared for option in plan.options)
        if plan.peak > budget:
            assert plan.options == least and budget < need
        assert before is None or (before.peak <= plan.peak and before.spared <= plan.spared)
        before = plan
        for menu, option in zip(menus, plan.options, strict=True):
            assert option in (menu.least, *menu.by_peak, *menu.by_held)


@pytest.mark.parametrize("seed", range(10))
def test_no_other_choice_of_one_call_is_better(seed):
    """Of all first stored blocks and all sets of outputs."""
    choose = random.Random(seed)
    menu = SequenceMenu([random_cost(choose, k) for k in range(5)], choose.random() < 0.5, False)
    sets = [frozenset(k for k in range(5) if bits >> k & 1) for bits in range(32)]
    options = [menu.option(Choice(k, chosen)) for k in range(6) for chosen in sets if all(c < k for c in chosen)]
    for budget in range(0, 1500, 37):
        fit = [option.spared for option in options if option.peak <= budget and menu.least.peak <= budget]
        best = max(fit, default=0)
        found = planned([menu], budget)
        # Sets are compared in the order of what their outputs save per byte, which comes close.
        assert found.peak > budget or best - max(cost.spared for cost in menu.costs) <= found.spared <= best


# Of real networks


class Cell(revflow.RecurrentCell):
    """Without a memory."""

    def __init__(self, channels, width):
        super().__init__()
        self.gates = nn.Sequential(nn.Conv2d(2 * channels, width, 1), nn.SiLU(), nn.Conv2d(width, 2 * channels, 1))

    def update(self, streams, state, memory, context):
        a, b = self.gates(torch.cat((streams[0], *state), 1)).chunk(2, 1)
        return (torch.tanh(a) * torch.sigmoid(b) + state[0],), memory

    def mix(self, streams, state, context):
        return streams[1] + torch.sigmoid(state[0]) * streams[0], streams[0]


class Net(nn.Module):
    """An encoder and a decoder of random blocks, with a recurrence between them or several passes through both."""

    def __init__(self, choose, budget):
        super().__init__()
        self.channels, self.calls = choose.choice([2, 4]), choose.randint(1, 3)
        options = {"memory_budget": budget, "guard": "off"}
        self.encoder = revflow.ReversibleSequence(self._blocks(choose), **options)
        self.decoder = revflow.ReversibleSequence(self._blocks(choose), **options)
        widths = [choose.choice([4, 8, 24]) for _ in range(choose.choice([0, 1, 3]))]
        self.stack = revflow.ReversibleRecurrence([Cell(self.channels, width) for width in widths], **options)

    def _blocks(self, choose):
        blocks = []
        for _ in range(choose.randint(1, 5)):
            if choose.random() < 0.15:
                blocks.append(Scale())
            coupling, outputs = choose.choice(KINDS)
            count = choose.choice([1, 1, 2])
            blocks.append(coupling(*[conditioner(choose, self.channels, outputs) for _ in range(count)]))
        return blocks

    def forward(self, x):
        if not len(self.stack):
            for _ in range(self.calls):
                x = self.decoder(self.encoder(x))
            return x
        zeros = torch.zeros_like(x[0])
        state = revflow.RecurrentState(((zeros,),) * len(self.stack), ((),) * len(self.stack))
        x = self.encoder(x)
        for _ in range(self.calls):
            x, state = self.stack.step(x, state)
        return self.decoder.inverse(x)


def training(net, x):
    """A step whose loss takes nothing itself."""
    for leaf in (*x, *net.parameters()):
        leaf.grad = torch.zeros_like(leaf)
    seeds = [torch.ones_like(s) for s in x]

    def step():
        outputs = net(x)
        edges = [edge_to(s) for s in outputs]
        del outputs
        torch.autograd.backward(edges, seeds)

    return step


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_tracked_peaks_of_random_networks(seed):
    """They follow the plan up to the temporary memory that recomputes one block or time step, which a plan only estimates."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    budget = revflow.Budget(HUGE)
    net = Net(choose, budget)
    x = tuple(image(2, net.channels, 8, 8, dtype=torch.float32, seed=k).requires_grad_() for k in (1, 2))
    step = training(net, x)
    # Beside .grad there are, for a moment, one block's or cell's gradients.
    own = max(sum(p.nbytes for p in part.parameters()) for parts in net.children() for part in parts)
    step()
    everything = budget.plan
    limited(budget, 0)
    least, near = budget.plan, transient_of(budget) + own
    highest, before, tracked = 0, None, []
    for share in (0.9, 1.0, 1.2, 1.6, 2.5, 100.0):
        limit = int(share * least.peak)
        limited(budget, limit)
        plan = budget.plan
        step()  # plans, and frees nothing that is measured
        found = revflow.measure_memory(step).peak
        assert found <= max(limit, least.peak) + near, share
        assert found >= highest - near, share
        highest = max(highest, found)
        if before is not None and before.peak <= share * least.peak:
            assert before.time_ratio >= plan.time_ratio
        before = plan
        tracked.append(found)
    assert plan.calls == everything.calls
    assert plan.time_ratio == 1
    assert tracked[-1] == highest
