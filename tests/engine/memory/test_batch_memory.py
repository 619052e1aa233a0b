"""predict_memory: one run's bytes at every batch size, against real steps of each size, and by hand."""

import pytest
import torch
from torch import nn

import revflow
from engine.nets import additive, affine_two, gated, mixed


def training_step(make, run):
    """A step of Adam on a network of `make`'s blocks, run by `run`: a function of the batch size."""

    def step(batch):
        net = revflow.ReversibleSequence(make(), guard="off")  # fake tensors have no values for it to compare
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        x = torch.randn(batch, 8, 12, 8)
        for _ in range(2):
            optimizer.zero_grad()
            run(net)(x).square().mean().backward()
            optimizer.step()

    return step


BLOCKS = {
    "additive": lambda: [additive() for _ in range(6)],
    "affine_two": lambda: [affine_two() for _ in range(3)],
    "gated": lambda: [gated() for _ in range(3)],
    "mixed": mixed,
    # As many parameters as activations: which moment is the peak depends on the batch size.
    "heavy": lambda: [revflow.AdditiveCoupling(nn.Conv2d(4, 4, 15, padding=7)) for _ in range(4)],
}


@pytest.mark.parametrize("run", [lambda net: net, lambda net: net.plain], ids=["reversible", "plain"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_peak_at_every_batch_size_is_that_of_a_real_step(name, run):
    step = training_step(BLOCKS[name], run)
    memory = revflow.predict_memory(step)
    for batch in (2, 3, 7):
        assert memory.peak(batch) == revflow.measure_memory(lambda batch=batch: step(batch)).peak
    # One sample's streams are contiguous halves of their tensor, which are shared rather than copied.
    stream = 4 * 12 * 8 * 4
    assert abs(memory.peak(1) - revflow.measure_memory(lambda: step(1)).peak) <= 3 * stream


def two_moments(batch):
    fixed = torch.zeros(1000)  # 4,000 bytes alone
    del fixed
    growing = torch.zeros(batch, 10)  # 40 a sample, with
    other = torch.zeros(25)  # 100
    return growing, other


def test_moments_by_hand():
    memory = revflow.predict_memory(two_moments)
    assert memory.peaks == ((100, 40), (4000, 0))
    assert [memory.peak(batch) for batch in (0, 1, 97, 98)] == [4000, 4000, 4000, 100 + 40 * 98]


def test_moments_that_are_never_the_peak_are_left_out():
    def step(batch):
        for fixed, sample in ((4000, 1), (2000, 2), (2400, 2), (2300, 2), (1400, 4), (1000, 3)):
            both = torch.zeros(fixed // 4), torch.zeros(batch, sample, dtype=torch.int8)
            del both

    # 2,400 + 2 b is the peak nowhere: 4,000 + b is up to b = 866, and from there on 1,400 + 4 b.
    assert revflow.predict_memory(step).peaks == ((1400, 4), (4000, 1))


@pytest.mark.parametrize("capacity", [0, 3999, 4000, 4019, 4020, 4059, 4060, 10**9, 16 * 2**30])
def test_the_largest_batch_is_the_last_that_fits(capacity):
    memory = revflow.predict_memory(two_moments)
    batch = memory.largest_batch(capacity)
    assert memory.peak(batch) <= capacity or batch == 0
    assert memory.peak(batch + 1) > capacity


def test_a_step_that_ignores_its_batch_has_no_largest():
    memory = revflow.predict_memory(lambda batch: torch.zeros(10))
    assert memory.peak(5) == 40
    with pytest.raises(ValueError, match="does not grow with the batch"):
        memory.largest_batch(2**30)


def test_nothing_is_allocated():
    def step(batch):
        return torch.zeros(batch, 2**20)

    assert revflow.predict_memory(step).peak(3) == 3 * 2**22
