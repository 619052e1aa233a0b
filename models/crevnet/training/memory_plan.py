"""Plans, before the first epoch, which activations CrevNet stores, and saves the plan with the checkpoints.

Stored and recomputed activations differ by rounding. A resumed run equals the uninterrupted one because it follows the same plan
from its first step on. The plan therefore belongs to the same moment as the weights: the end of the last optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor

import revflow
from crevnet.data.sampling import WindowLoader
from crevnet.networks.crevnet.free_share import amount, budget_of, is_amount, room
from crevnet.networks.crevnet.network import CrevNet
from crevnet.training.task import VideoModelTask


class MemoryPlan(lightning.Callback):
    """Plans the memory of a training step with a forward pass, and reports the plan. Does nothing for other models.

    Args:
        batches: the training batches.
        window: the shape (T, C, H, W) of a window.
        processes: number of processes on this machine, which share its free memory.
        report: takes the line that describes the plan.
    """

    def __init__(
        self, batches: WindowLoader, window: tuple[int, ...], processes: int, report: Callable[[str], object]
    ) -> None:
        self._batches, self._window, self._processes, self._report = batches, window, processes, report
        self._saved: dict[str, Any] | None = None
        """The state in the checkpoint from which training resumes."""
        self._state: dict[str, Any] | None = None
        """The state after the last optimizer step."""

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("memory")  # older checkpoints lack it

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        network = module.network
        if not isinstance(network, CrevNet):
            return
        saved = self._saved if self._saved is not None and self._saved["step"] == self._step_of(module) else None
        self._set_amount(trainer, network, saved)
        if saved is not None:
            network.budget.load_state_dict(saved["plan"])
        else:
            # All processes plan the batches of all: the checkpoint has the plan of one, and each process resumes by it.
            for size in self._batches.sizes:
                self._plan(trainer, module, network, size)
        self._state = self._state_of(module, network)
        if trainer.is_global_zero:
            self._report(_described(network))

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        stepped = (index + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if stepped and isinstance(module.network, CrevNet):
            self._state = self._state_of(module, module.network)

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if self._state is not None:
            checkpoint["memory"] = self._state

    def _set_amount(self, trainer: lightning.Trainer, network: CrevNet, saved: dict[str, Any] | None) -> None:
        """Set the same amount in all processes: that of the checkpoint if it fits, else a share of the free memory."""
        given = network.config.memory_budget
        if is_amount(given):
            return
        place = [*network.parameters()], trainer.optimizers[0].state, self._processes
        limit = None if saved is None or saved["given"] != given else saved["amount"]
        if limit in ("min", "max"):  # of compiled training, which has no other budgets
            network.use_budget(revflow.Budget(limit))
            return
        if isinstance(limit, int):
            most = _least(trainer, network, room(*place))
            if limit <= most:
                network.use_budget(budget_of(given, limit))
                return
            if trainer.is_global_zero:
                self._report(
                    f"the memory budget of the checkpoint is {limit / 2**30:.2f} GiB, but only {most / 2**30:.2f} GiB are "
                    "free: a new plan is made, and the resumed run will equal an uninterrupted one only up to rounding"
                )
        network.use_budget(budget_of(given, _least(trainer, network, amount(given, *place))))

    def _plan(self, trainer: lightning.Trainer, module: VideoModelTask, network: CrevNet, size: int) -> None:
        """Measure the calls of a training step with the forward pass of a batch of `size` windows."""
        config = network.config
        frames = torch.zeros(size, *self._window, device=module.device)
        static = torch.zeros(size, config.static_channels, *frames.shape[-2:], device=module.device)
        frames, static = trainer.precision_plugin.convert_input((frames, static))
        with trainer.precision_plugin.train_step_context():
            network.plan(frames, static if config.static else None, *module.loss_options(frames))

    def _state_of(self, module: VideoModelTask, network: CrevNet) -> dict[str, Any]:
        """The amount and the plan, as plain values."""
        budget = network.budget
        return {
            "given": network.config.memory_budget,
            "amount": budget.memory,
            "step": self._step_of(module),
            "plan": budget.state_dict(),
        }

    def _step_of(self, module: VideoModelTask) -> list[Any]:
        """Everything in the settings that determines the calls of a training step."""
        training = module.training_settings
        shapes = self._batches.sizes, list(self._window)
        return [*shapes, training.precision, training.loss, training.sampling_steps, training.compile]


def _least(trainer: lightning.Trainer, network: CrevNet, count: int) -> int:
    """The smallest of the processes' numbers."""
    own = torch.tensor(count, device=next(network.parameters()).device)
    least: Tensor = trainer.strategy.reduce(own, reduce_op="min")
    return int(least)


def _described(network: CrevNet) -> str:
    """The plan in one line."""
    given, plan = network.config.memory_budget, network.budget.plan
    if plan is not None:
        return f"memory budget {given}: {plan.summary}"
    stored = "stored" if network.budget.memory == "max" else "recomputed"
    return f"memory budget {given}: all activations are {stored}"
