"""revflow's budgets for a network, and the largest one whose measured peak is at most a given number of bytes."""

from __future__ import annotations

from functools import cached_property, partial

import torch

import revflow
from kit.methods import planned
from kit.networks import Network

UNLIMITED = 2**60
FURTHER = 6
"""Number of larger budgets to measure."""


class Budgets:
    """The budgets that lead to different plans, in increasing order.

    A plan's peak may differ from the measured one: the plan counts neither the step's input nor the temporary memory of the loss.
    So the peak of every candidate is measured.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network, self._device = network, device
        self._peaks: dict[int, int] = {}
        """The measured peak by budget."""

    @cached_property
    def distinct(self) -> list[int]:
        """The smallest budget for each plan: the plan's own peak."""
        least, found = planned(self._network, "min").peak, [self._planned(UNLIMITED)]
        while found[-1] > least:
            found.append(self._planned(found[-1] - 1))
        return found[::-1]

    def part(self, part: int, parts: int) -> int:
        """A share of the way from the smallest of them to the largest."""
        low, high = self.distinct[0], self.distinct[-1]
        return low + (high - low) * part // parts

    def within(self, limit: int) -> int | None:
        """The largest budget found whose measured peak is at most `limit`; None if the smallest one needs more.

        A bisection; then some larger ones, as a larger budget may have a smaller measured peak.
        """
        budgets = self.distinct
        if self._measured(budgets[-1]) <= limit:
            return budgets[-1]
        if self._measured(budgets[0]) > limit:
            return None
        first, last = 0, len(budgets) - 1  # the first fits, the last does not
        while last - first > 1:
            middle = (first + last) // 2
            if self._measured(budgets[middle]) <= limit:
                first = middle
            else:
                last = middle
        return max([b for b in budgets[first : last + FURTHER] if self._measured(b) <= limit])

    @cached_property
    def _state(self) -> dict[str, object]:
        """The measured costs, for all budgets."""
        budget = revflow.Budget(UNLIMITED)
        self._step(budget)
        return budget.state_dict()

    def _budget(self, memory: int) -> revflow.Budget:
        budget = revflow.Budget(memory)
        budget.load_state_dict(self._state)
        return budget

    def _planned(self, memory: int) -> int:
        plan = self._budget(memory).plan
        assert plan is not None
        return plan.peak

    def _measured(self, memory: int) -> int:
        if memory not in self._peaks:
            step = partial(self._step, self._budget(memory))
            step()
            self._peaks[memory] = revflow.measure_memory(step, device=self._device).peak
        return self._peaks[memory]

    def _step(self, budget: revflow.Budget) -> None:
        network = self._network
        net = revflow.ReversibleSequence(network.blocks, network.split_dim, memory_budget=budget)
        network.step(lambda x: net(network.parted(x)))
