"""Configurations: settings that all models share, CrevNet's architecture, and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

MYPY = False
if MYPY:  # mypy takes it for true; jsonargparse would import what is below TYPE_CHECKING, and PyTorch with it
    import revflow

ModelName = Literal["crevnet", "convlstm", "predrnn", "predrnnpp", "vpn", "prednet", "unet"]
"""Every model: CrevNet, and each baseline by the name of its file in `baselines/`."""
States = Literal["kept", "bfloat16", "offloaded"] | int
"""revflow.States, here without PyTorch, whose import takes seconds: the command line has options for these settings."""
MemoryBudget = int | float | str
"""The memory for activations: "auto", or a memory budget of revflow."""
Cell = Literal["st-lstm", "convlstm"]
Attention = Literal["deep", "pointwise"]
Loss = Literal["all", "future", "padded"] | int
"""The predictions that a loss covers; a number selects one future frame, 1 being the first."""
Feedback = Literal["latent", "frame"]
"""The input to CrevNet's next step in a forecast: the latent of the predicted frame, or the decoded frame."""
Static = Literal["road_map", "connectivity", "clock"]

STATIC_CHANNELS: dict[Static, int] = {"road_map": 1, "connectivity": 8, "clock": 4}
"""Number of channels of each static input, which is constant within a window."""


@dataclass(frozen=True)
class ModelConfig:
    """The configuration options shared by all video models.

    Args:
        name: name of the model.
        channels: number of data channels per frame (three in Traffic4cast 2019: volume, speed and heading).
        static: inputs that are constant within a window and are not predicted: `road_map`, `connectivity` (roads to the eight
            neighboring pixels, from the 2021 static files) and `clock` (time of day and day of the week).
        past: number of input frames.
        horizon: number of predicted frames.

    Examples:
        >>> config = crevnet.MODELS["unet"].config(channels=1, static=(), past=4, horizon=2)
        >>> isinstance(config, crevnet.ModelConfig), config.input_channels
        (True, 1)
    """

    title: ClassVar[str]
    """Name of the model in tables."""
    score_name: ClassVar[str] = "MSE"
    """Name of the validation score by which checkpoints are compared. A lower score is better."""
    losses: ClassVar[tuple[Loss, ...]] = ("all", "future")
    """Values of `over` supported by `loss`, in addition to the number of a single future frame."""
    feeds_back: ClassVar[bool] = True
    """Whether the model predicts frame by frame. If so, its own predictions can be used as inputs during training."""

    name: str
    channels: int = 3
    static: tuple[Static, ...] = ("road_map",)
    past: int = 9
    horizon: int = 3

    def __post_init__(self) -> None:
        for name in ("channels", "past", "horizon"):
            check_at_least_one(name, getattr(self, name))
        if len(set(self.static)) < len(self.static) or not set(self.static) <= set(STATIC_CHANNELS):
            raise ValueError(
                f"static must contain each of {', '.join(STATIC_CHANNELS)} at most once; got {self.static}"
            )

    @property
    def input_channels(self) -> int:
        """Number of input channels of the network: data channels plus static channels."""
        return self.channels + self.static_channels

    @property
    def static_channels(self) -> int:
        return sum(STATIC_CHANNELS[name] for name in self.static)

    @property
    def score_tag(self) -> str:
        """Name under which the validation score is logged."""
        return f"val/{self.score_name.lower()}"

    @property
    def window(self) -> int:
        """Number of frames in a training window: `past` plus `horizon`."""
        return self.past + self.horizon

    def check_loss(self, over: Loss) -> None:
        """Raise a ValueError if the model does not support the loss selected by `over`."""
        if over not in self.losses and not (type(over) is int and 1 <= over <= self.horizon):
            raise ValueError(
                f"the loss of {self.name} must be {', '.join(map(str, self.losses))}, or the number of one future frame, 1 to "
                f"{self.horizon}; got {over!r}"
            )


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError if `value` is less than 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def check_memory_budget(value: MemoryBudget) -> None:
    """Raise ValueError unless `value` is "auto" or a memory budget of revflow."""
    if value in ("auto", "min", "max"):
        return
    import revflow

    try:
        revflow.Budget(value)
    except (TypeError, ValueError) as error:
        if value is None or value in ("none", "all"):  # names of earlier versions, for which the error has the new ones
            raise ValueError(str(error)) from error
        raise ValueError(
            'memory_budget must be "auto", "min", "max", a whole number of bytes, a size such as "24GiB", or a share of the '
            f"free memory such as 0.5; got {value!r}"
        ) from error


@dataclass(frozen=True)
class CrevNetConfig(ModelConfig):
    """The configuration of CrevNet. For `channels`, `static`, `past` and `horizon`, see `ModelConfig`.

    Args:
        blocks: number of reversible blocks in each autoencoder stage. The paper counts each block as three layers.
        strides: downsampling factor of each stage, 1 or 2. Frames are also downsampled by a factor of 2 before the
            first stage.
        bottleneck: ratio of the number of stream channels to the number of channels inside a block.
        modules: number of reversible predictive modules.
        cell: type of recurrent cell in each module.
        attention: network that computes a module's gate: `deep` (1x1, 3x3 and 1x1 convolutions with normalization layers
            between them) or `pointwise` (one 1x1 convolution).
        clip: number of consecutive frames (a clip) that are processed and predicted together. If it is greater than 1,
            convolutions are three-dimensional and extend over time. Each clip begins one frame after the previous one.
        exact_bits: number of fractional bits of the grid (revflow.Grid) to which streams are rounded. Recomputed streams are
            then bit-identical to the original ones. With 16 bits, float32 can represent values up to 256. By default, streams are
            not rounded to a grid.
        states: storage method for the states h, c and m until the backward pass (revflow.ReversibleRecurrence): `kept`
            (unchanged), `bfloat16` (rounded, half the memory), `offloaded` (in CPU memory), or an integer n (every n-th time
            step is stored and the others are recomputed).
        memory_budget: memory for activations. As many as fit are stored, and the others are recomputed. "auto": a share of the
            memory that is free when training starts. "min": all activations are recomputed. "max": all are stored. Otherwise a
            number of bytes, a size such as "24GiB", or a share of the free memory such as 0.5. It changes the time and the
            memory of a training step, but not the function that the network computes.

    Examples:
        >>> config = crevnet.CrevNetConfig(channels=1, static=(), blocks=(1, 1), strides=(1, 2), modules=2)
        >>> config.downsampling
        4
        >>> crevnet.PRESETS["paper"].modules
        8
    """

    title: ClassVar[str] = "CrevNet"
    losses: ClassVar[tuple[Loss, ...]] = ("all", "future", "padded")

    name: Literal["crevnet"] = "crevnet"
    blocks: tuple[int, ...] = (3, 3, 3, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    bottleneck: int = 4
    modules: int = 8
    cell: Cell = "st-lstm"
    attention: Attention = "deep"
    clip: int = 1
    exact_bits: int | None = None
    states: States = "kept"
    memory_budget: MemoryBudget = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bottleneck", "modules", "clip"):
            check_at_least_one(name, getattr(self, name))
        if not self.blocks or len(self.blocks) != len(self.strides):
            raise ValueError(
                f"blocks and strides must have one entry per stage; got {len(self.blocks)} and {len(self.strides)} entries"
            )
        if min(self.blocks) < 1 or not set(self.strides) <= {1, 2}:
            raise ValueError(f"blocks must be at least 1, and strides 1 or 2; got {self.blocks} and {self.strides}")
        if self.cell not in ("st-lstm", "convlstm"):
            raise ValueError(f"cell must be st-lstm or convlstm, not {self.cell!r}")
        if self.attention not in ("deep", "pointwise"):
            raise ValueError(f"attention must be deep or pointwise, not {self.attention!r}")
        if self.past < self.clip:
            raise ValueError(
                f"past must be at least clip, the number of frames per input; got past={self.past} and clip={self.clip}"
            )
        if self.exact_bits is not None and not 1 <= self.exact_bits <= 52:
            raise ValueError(f"exact_bits must be from 1 to 52, or none, not {self.exact_bits}")
        named, is_number = ("kept", "bfloat16", "offloaded"), type(self.states) is int and self.states >= 1
        if not is_number and self.states not in named:
            raise ValueError(f"states must be {', '.join(named)}, or a number of at least 1, not {self.states!r}")
        check_memory_budget(self.memory_budget)

    @property
    def grid(self) -> revflow.Grid | None:
        """The grid to which streams are rounded in exact arithmetic, or None if exact arithmetic is not used."""
        import revflow

        return None if self.exact_bits is None else revflow.Grid(self.exact_bits)

    @property
    def downsampling(self) -> int:
        """Total downsampling factor. The height and width of a frame are padded to multiples of this factor."""
        factor = 2
        for stride in self.strides:
            factor *= stride
        return factor

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels per stream in each stage."""
        width, widths = 2 * self.input_channels, []
        for stride in self.strides:
            width *= stride**2
            widths.append(width)
        return tuple(widths)


PRESETS = {
    # Yu et al. 2019: 36 layers, 8 modules, 9 frames -> 3
    "paper": CrevNetConfig(),
    # the authors' published Traffic4cast code: 24 layers, 6 modules, 5 frames -> 3
    "authors": CrevNetConfig(blocks=(2, 2, 2, 2), modules=6, past=5),
    # trains in minutes on two CPU cores: for tests and the demo
    "tiny": CrevNetConfig(blocks=(1, 1), strides=(1, 2), modules=2, past=6, horizon=3),
    # the follow-up (Yu et al. 2020) on Moving MNIST, as in its published code: clips of 3 frames, 10 frames -> 10
    "moving-mnist": CrevNetConfig(
        channels=1,
        static=(),
        past=10,
        horizon=10,
        blocks=(4, 5, 3),
        strides=(1, 2, 2),
        bottleneck=2,
        attention="pointwise",
        clip=3,
    ),
}
