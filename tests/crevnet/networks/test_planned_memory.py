"""One memory budget for CrevNet's encoder, predictor and decoder: peak and FLOPs of steps on tensors without data."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import crevnet
import revflow

GIB = 2**30


class Flops(TorchDispatchMode):
    """Counts floating-point operations. PyTorch's FlopCounterMode registers hooks on states, which a recurrence refuses."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Training:
    """Training steps of a network on tensors without data."""

    def __init__(self, config, batch, height, width):
        self.config = config
        self.frames = torch.rand(batch, self.config.window, 3, height, width)
        self.static = torch.rand(batch, self.config.static_channels, height, width)

    def measured(self, memory_budget):
        """(peak without parameters' gradients, FLOPs) of a step that follows the plan, and the bytes of the parameters."""
        network = crevnet.CrevNet(self.config)
        network.use_budget(memory_budget)
        parameters = sum(p.nbytes for p in network.parameters())

        def step():
            network.zero_grad()
            network.loss(self.frames, self.static).backward()

        network.loss(self.frames, self.static)  # learns the costs; its graph is dropped
        peak = revflow.measure_memory(step).peak - parameters
        with Flops() as flops:
            step()
        return peak, flops.total, parameters


@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_budget_is_kept_and_more_memory_never_costs_time():
    with FakeTensorMode():
        training = Training(replace(crevnet.PRESETS["tiny"], past=3, horizon=2), 2, 64, 48)
        least, slowest, _ = training.measured(revflow.Budget("min"))
        most, fastest, _ = training.measured(revflow.Budget("max"))
        before = slowest
        for share in (0.0, 0.4, 0.8, 2.0):
            budget = int(least + share * (most - least))
            peak, flops, _ = training.measured(revflow.Budget(budget))
            assert peak <= max(budget, least)
            assert flops <= before, share
            before = flops
    assert slowest > 1.2 * fastest
    assert (peak, flops) == (most, fastest)


@pytest.mark.slow
def test_the_paper_at_full_size_on_five_devices():
    """Batch 12 at 495 x 436: the devices' memory without parameters, gradients and Adam's state is the budget."""
    with FakeTensorMode():
        training = Training(crevnet.PRESETS["paper"], 12, 495, 436)
        _, before, parameters = training.measured(revflow.Budget("min"))
        most, fastest, _ = training.measured(revflow.Budget("max"))
        for device in (16, 24, 32, 48, 80):
            budget = revflow.Budget(device * GIB - 4 * parameters)
            peak, flops, _ = training.measured(budget)
            assert max(peak, budget.plan.peak) <= budget.memory
            assert flops <= before, device
            before = flops
    assert (peak, flops) == (most, fastest)
