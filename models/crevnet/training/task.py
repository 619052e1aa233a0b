"""A training step of any video model, its validation scores and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from crevnet.data.files.layout_2019 import TRAFFIC4CAST_2019
from crevnet.data.files.layouts import Layout
from crevnet.networks.config import Loss, ModelConfig
from crevnet.networks.crevnet.network import CrevNet
from crevnet.networks.models import make_network
from crevnet.training.failures import DivergedError
from crevnet.training.scheduled_sampling import fed_frames
from crevnet.training.settings import TrainingSettings


class VideoModelTask(lightning.LightningModule):
    """The training step, the validation scores and the optimizer. `layout` determines the lead times in the scores' names."""

    def __init__(self, model: ModelConfig, training: TrainingSettings, layout: Layout = TRAFFIC4CAST_2019) -> None:
        super().__init__()
        self._layout = layout
        self.network = make_network(model)
        self.training_settings = training
        if training.precision == "64-true":
            self.network.double()  # here, because Lightning would first load a checkpoint's weights into float32
        if training.channels_last:
            self.network.to(memory_format=self.network.channels_last)  # type: ignore[call-overload]
        if training.compile:
            self.network.compile_parts()

    def configure_model(self) -> None:
        """Under FSDP, shard the parameters. The network is one unit, because the engine calls its submodules directly."""
        if self.device_mesh is not None and not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
            for method in ("loss", "scores", "generate", *(["plan"] if isinstance(self.network, CrevNet) else [])):
                register_fsdp_forward_method(self.network, method)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        own = self.network.loss(batch["frames"], self._static(batch), *self.loss_options(batch["frames"]))
        loss: Tensor = own * batch["part"].share
        mean = self.trainer.strategy.reduce(loss.detach().clone())  # so that all processes raise together
        if not torch.isfinite(mean):  # GradScaler handles infinite gradients of a finite loss
            raise DivergedError(f"the loss is {mean.item()} in step {self.trainer.global_step + 1}")
        self.log("train/loss", mean, prog_bar=True, batch_size=batch["part"].windows)
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        loss, tag, part = self.training_settings.loss, self.network.config.score_tag, batch["part"]
        number = loss if isinstance(loss, int) else None
        scores = part.share * self.network.scores(batch["frames"], self._static(batch), number)
        # The weight is the whole batch's, equal in all processes. With unequal weights, Lightning's mean would be rounded.
        same = {"sync_dist": True, "batch_size": part.windows}
        self.log(tag, scores.mean(), prog_bar=True, **same)
        for horizon, score in enumerate(scores, number or 1):
            self.log(f"{tag}/{self._layout.lead(horizon)}", score, **same)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FusedAdam(self.network.parameters(), self.training_settings.learning_rate)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.zero_grad()  # otherwise Lightning would hold them through the next forward pass

    def loss_options(self, frames: Tensor) -> tuple[Loss, list[bool] | None]:
        """`over` and `fed` of the network's loss in the next step."""
        return self.training_settings.loss, self._fed(frames)

    def _fed(self, frames: Tensor) -> list[bool] | None:
        """For each future frame but the last, whether the true frame is an input; None means all."""
        steps, model = self.training_settings.sampling_steps, self.network.config
        if steps is None:
            return None
        return fed_frames(frames.shape[1] - model.past - 1, steps, self.global_step, self.training_settings.seed)

    def _static(self, batch: dict[str, Any]) -> Tensor | None:
        return batch["static"] if self.network.config.static else None


class FusedAdam(torch.optim.Adam):
    """Adam in one kernel, without temporaries; other implementations allocate some as large as the parameters."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        super().__init__(parameters, learning_rate, fused=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any Adam, but keep this one's implementation and learning rate, which the state also contains."""
        groups = [
            {**saved, "fused": True, "lr": own["lr"]}
            for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the kernel requires the parameter's memory layout
                state[name] = torch.empty_like(parameter).copy_(state[name])
