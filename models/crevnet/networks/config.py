"""What a model is made of: what every one is given, CrevNet's architecture, and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

MYPY = False
if MYPY:  # mypy takes it for true; jsonargparse would import what is below TYPE_CHECKING, and PyTorch with it
    import revflow

ModelName = Literal["crevnet", "convlstm", "predrnn", "predrnnpp", "vpn", "prednet", "unet"]
States = Literal["kept", "bfloat16", "offloaded"] | int
"""revflow.States, here without PyTorch, whose import takes seconds: the command line has options for these settings."""
Cell = Literal["st-lstm", "convlstm"]
Attention = Literal["deep", "pointwise"]
Loss = Literal["all", "future", "padded"] | int
"""Which predictions a loss is taken over; a number is that of a future frame, 1 being the first."""
Feedback = Literal["latent", "frame"]
"""What CrevNet feeds back when it forecasts: latents of predicted frames, or the decoded frames."""
Static = Literal["road_map", "connectivity", "clock"]

STATIC_CHANNELS: dict[Static, int] = {"road_map": 1, "connectivity": 8, "clock": 4}
"""How many channels each of the inputs has that stay as they are within a window."""


@dataclass(frozen=True)
class ModelConfig:
    """What every video model is to predict, and from what.

    Args:
        name: which model.
        channels: data channels of a frame (Traffic4cast 2019: volume, speed, heading).
        static: inputs that stay as they are within a window, and are not predicted: the road_map; the connectivity of roads
            with their eight neighbours (2021's static files); the clock, time of day and day of the week.
        past: frames seen.
        horizon: frames predicted.

    Examples:
        >>> config = crevnet.MODELS["unet"].config(channels=1, static=(), past=4, horizon=2)
        >>> isinstance(config, crevnet.ModelConfig), config.input_channels
        (True, 1)
    """

    title: ClassVar[str]
    """The model's name in tables."""
    score_name: ClassVar[str] = "MSE"
    """What checkpoints are compared by, on the validation days."""
    losses: ClassVar[tuple[Loss, ...]] = ("all", "future")
    """The predictions that its training loss may be taken over, beside those of one future frame."""
    feeds_back: ClassVar[bool] = True
    """Whether it goes from frame to frame, so that training may feed its own predictions."""

    name: str
    channels: int = 3
    static: tuple[Static, ...] = ("road_map",)
    past: int = 9
    horizon: int = 3

    def __post_init__(self) -> None:
        for name in ("channels", "past", "horizon"):
            check_at_least_one(name, getattr(self, name))
        if len(set(self.static)) < len(self.static) or not set(self.static) <= set(STATIC_CHANNELS):
            raise ValueError(f"static takes each of {', '.join(STATIC_CHANNELS)} once; got {self.static}")

    @property
    def input_channels(self) -> int:
        """Channels of a frame as the network sees it."""
        return self.channels + self.static_channels

    @property
    def static_channels(self) -> int:
        return sum(STATIC_CHANNELS[name] for name in self.static)

    @property
    def score_tag(self) -> str:
        """What the validation score is called in the logs."""
        return f"val/{self.score_name.lower()}"

    @property
    def window(self) -> int:
        """Frames in a training window."""
        return self.past + self.horizon

    def check_loss(self, over: Loss) -> None:
        """Raises ValueError where the model has no such loss."""
        if over not in self.losses and not (type(over) is int and 1 <= over <= self.horizon):
            raise ValueError(
                f"the loss of {self.name} is over {', '.join(map(str, self.losses))}, or over one future frame, 1 to "
                f"{self.horizon}; got {over!r}"
            )


def check_at_least_one(name: str, value: int) -> None:
    """Raises ValueError where a value that counts something is not positive."""
    if value < 1:
        raise ValueError(f"{name} has to be at least 1, not {value}")


@dataclass(frozen=True)
class CrevNetConfig(ModelConfig):
    """CrevNet's architecture.

    Args:
        blocks: reversible blocks in each stage of the autoencoder; a block counts as three layers in the paper.
        strides: downsampling of each stage, 1 or 2. The frame itself is downsampled by 2 in front of the first stage.
        bottleneck: a block's inner width is its stream's width divided by this.
        modules: number of reversible predictive modules.
        cell: the recurrent cell of each module.
        attention: what a module's gate is computed by: deep, three convolutions, 1x1, 3x3 and 1x1, with norms between them; or
            pointwise, a 1x1 convolution.
        clip: frames that the network sees, and predicts, at a time. Where they are several, convolutions go over time too
            (three-dimensional), and each clip begins a frame after the one before.
        exact_bits: compute on a grid of multiples of 2^-exact_bits (revflow.Grid), so that what is rebuilt is equal to the
            last bit; in ordinary floating point if not given. 16 bits hold values up to 256 in float32.
        states: how training keeps the modules' states h, c and m for its backward pass: kept; bfloat16, rounded, which
            takes half the memory; offloaded to the CPU's; or a number n, those of every n-th time step, the others being
            computed again (revflow.ReversibleRecurrence).

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bottleneck", "modules", "clip"):
            check_at_least_one(name, getattr(self, name))
        if not self.blocks or len(self.blocks) != len(self.strides):
            raise ValueError(
                f"blocks and strides need one entry a stage; got {len(self.blocks)} and {len(self.strides)} entries"
            )
        if min(self.blocks) < 1 or not set(self.strides) <= {1, 2}:
            raise ValueError(f"blocks have to be at least 1 and strides 1 or 2; got {self.blocks} and {self.strides}")
        if self.cell not in ("st-lstm", "convlstm"):
            raise ValueError(f"cell has to be st-lstm or convlstm, not {self.cell!r}")
        if self.attention not in ("deep", "pointwise"):
            raise ValueError(f"attention has to be deep or pointwise, not {self.attention!r}")
        if self.past < self.clip:
            raise ValueError(
                f"past has to be at least clip, whose frames are seen at a time; got {self.past} and {self.clip}"
            )
        if self.exact_bits is not None and not 1 <= self.exact_bits <= 52:
            raise ValueError(f"exact_bits has to be from 1 to 52, or none, not {self.exact_bits}")
        is_number = type(self.states) is int and self.states >= 1
        if not is_number and self.states not in ("kept", "bfloat16", "offloaded"):
            raise ValueError(f"states has to be kept, bfloat16, offloaded, or a number from 1 on, not {self.states!r}")

    @property
    def grid(self) -> revflow.Grid | None:
        """Where streams live in exact arithmetic."""
        import revflow

        return None if self.exact_bits is None else revflow.Grid(self.exact_bits)

    @property
    def downsampling(self) -> int:
        """Height and width of a frame are padded to multiples of this."""
        factor = 2
        for stride in self.strides:
            factor *= stride
        return factor

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of one stream in each stage."""
        width, widths = 2 * self.input_channels, []
        for stride in self.strides:
            width *= stride**2
            widths.append(width)
        return tuple(widths)


PRESETS = {
    # Yu et al. 2019: 36 layers, 8 modules, 9 frames -> 3
    "paper": CrevNetConfig(),
    # their published Traffic4cast code: 24 layers, 6 modules, 5 frames -> 3
    "authors": CrevNetConfig(blocks=(2, 2, 2, 2), modules=6, past=5),
    # trains in minutes on two CPU cores: for tests and the demo
    "tiny": CrevNetConfig(blocks=(1, 1), strides=(1, 2), modules=2, past=6, horizon=3),
    # the follow-up (Yu et al. 2020) on Moving MNIST, as in their published code: clips of 3 frames, 10 frames -> 10
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
