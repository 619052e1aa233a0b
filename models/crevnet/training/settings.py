"""The settings of a run: the sections of its configuration file, in which each value is also an option of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from crevnet.data.files.protocol import protocol
from crevnet.data.settings import DataSettings
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import replace_file
from crevnet.machine.yaml_text import load_yaml
from crevnet.networks.config import CrevNetConfig, Loss, ModelConfig, ModelName
from crevnet.training.recipe_folders import base_run, is_recipe

if TYPE_CHECKING:
    from crevnet.machine.parser import Parser


@dataclass(frozen=True)
class TrainingSettings:
    """Training.

    Args:
        epochs: number of epochs. An epoch is one pass over the data, or over `batches` of it.
        batches: number of training batches per epoch, by default all.
        validation_batches: number of validation batches after each epoch, by default all.
        learning_rate: Adam learning rate.
        loss: predictions that the loss covers. "all": every prediction of a window. "future": only those of future frames.
            "padded": all of them with padding and road map, as in the authors' code, only for CrevNet. A number: only that
            future frame, 1 being the first; it also selects the best checkpoint.
        start: folder of a run to start from. Training begins with its best weights instead of random ones.
        sampling_steps: number of optimizer steps of scheduled sampling (Bengio et al. 2015). The probability that a future
            frame is an input falls linearly from 1 to 0 over them; otherwise the model's own prediction is the input. 0 always
            feeds predictions, the default always true frames. Not for unet and vpn.
        accumulate: number of batches whose gradients are accumulated for each optimizer step.
        precision: Floating-point precision, as Lightning names it. 16-mixed suits a V100.
        max_minutes: maximum training time in minutes. The parts of a resumed run are added.
        accelerator: kind of device, as Lightning names it.
        devices: number of devices per machine. data.batch_size applies to each of them. Under torchrun, its number of processes
            counts instead.
        seed: seed of the initial weights and of the order of windows.
        channels_last: whether convolutions use the memory format channels_last, which is faster on tensor cores. Values are equal
            up to rounding.
        compile: whether to compile the network with torch.compile, which takes minutes in the first steps. Values are equal up
            to rounding. CrevNet compiles whole time steps. They store all activations if these fit in the memory budget, and none
            if not. Not with exact_bits.
        checkpoint_minutes: minutes of training between checkpoints in last.ckpt. Each epoch also writes one.
        nodes: number of machines that train together. Each runs the same command.
        strategy: strategy for several devices. "ddp": each holds a copy of everything. "fsdp": each holds a part of the
            parameters and of Adam's state, and parameters are gathered for each step. "auto" is ddp.
    """

    epochs: int = 100
    batches: int | None = None
    validation_batches: int | None = None
    learning_rate: float = 2e-4
    loss: Loss = "all"
    start: Path | None = None
    sampling_steps: int | None = None
    accumulate: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    max_minutes: float | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    seed: int = 0
    channels_last: bool = False
    compile: bool = False
    checkpoint_minutes: float = 15
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batches", "validation_batches", "accumulate", "devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"training.{name} must be at least 1, not {value}")
        for name in ("learning_rate", "max_minutes", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise ValueError(f"training.{name} must be positive and below a million, not {value}")
        if self.strategy == "fsdp" and self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"training.strategy fsdp requires training.precision 32-true or bf16-mixed, not {self.precision}: choose "
                "one, or use ddp"
            )
        if self.sampling_steps is not None and self.sampling_steps < 0:
            raise ValueError(f"training.sampling_steps cannot be negative; got {self.sampling_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed must be from 0 to 4294967295, not {self.seed}")


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run, stored as config.yaml in its folder."""

    model: ModelConfig = field(default_factory=CrevNetConfig)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        try:
            self.model.check_loss(self.training.loss)
        except ValueError as error:
            raise SettingsError(f"training.loss: {error}") from error
        if self.training.sampling_steps is not None and not self.model.feeds_back:
            raise SettingsError(
                f"training.sampling_steps does not apply to {self.model.name}, which never takes its own predictions as "
                "inputs: omit it"
            )
        if self.training.compile and isinstance(self.model, CrevNetConfig) and self.model.exact_bits is not None:
            raise SettingsError(
                "training.compile rounds differently in the forward and backward pass, which model.exact_bits prevents: "
                "choose one of them"
            )

    def save(self, folder: Path) -> None:
        save_yaml(folder / "config.yaml", asdict(self))


def save_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write values as YAML, with tuples as lists and paths as text. A missing folder is created."""
    text = yaml.safe_dump(_plain(values), sort_keys=False)
    replace_file(path, lambda file: file.write(text.encode()))


def with_protocol(settings: RunSettings, name: str | None) -> RunSettings:
    """The settings with those of a competition or of videos; unchanged for any other name."""
    model, data = settings.model, settings.data
    if name == "movies":
        return replace(settings, model=replace(model, static=()), data=replace(data, protocol="movies"))
    if name == "2019":  # which predicts certain time slots
        asked, data = protocol("2019"), replace(data, protocol="2019", validation_windows="test")
    elif name == "2021":  # which has all its days in one folder
        asked, data = protocol("2021"), replace(data, protocol="2021", validation_split="training")
    else:
        return settings
    model = replace(model, channels=len(asked.channels), past=asked.past, horizon=asked.horizon, static=("road_map",))
    return replace(settings, model=model, data=data)


def add_sections(parser: Parser, defaults: RunSettings) -> None:
    """Add an option for every setting of a run with the defaults' model."""
    parser.add_class_arguments(type(defaults.model), "model", default=asdict(defaults.model))
    parser.add_class_arguments(DataSettings, "data", default=asdict(defaults.data))
    parser.add_class_arguments(TrainingSettings, "training", default=asdict(defaults.training))


def default_model(name: str) -> ModelConfig:
    """The model of that name, in its paper's size. Raises SettingsError for an unknown name."""
    if name == CrevNetConfig.name:
        return CrevNetConfig()
    if name not in get_args(ModelName):
        raise SettingsError(f"there is no model {name}: choose one of {', '.join(get_args(ModelName))}")
    from crevnet.networks.models import MODELS  # with PyTorch, whose import takes seconds

    return MODELS[name].config(name)


def start_named_in(path: Path) -> dict[str, str]:
    """The preset, protocol and model.name in a configuration file; none of them if it cannot be read."""
    try:
        found = load_yaml(path)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    values = found if isinstance(found, dict) else {}
    model = values.get("model")
    values |= {"model.name": model.get("name") if isinstance(model, dict) else None}
    return {name: str(values[name]) for name in ("preset", "protocol", "model.name") if values.get(name) is not None}


def model_named_in(path: Path) -> str:
    """The model.name in a configuration file; CrevNet's if it has none or cannot be read."""
    return start_named_in(path).get("model.name", "crevnet")


def load_settings(run: Path) -> RunSettings:
    """The settings in a run's folder. Raises SettingsError if config.yaml is missing or wrong."""
    path = run / "config.yaml"
    if is_recipe(run):
        raise SettingsError(f"{run} is a recipe's folder, not a run's: name one of its runs, such as {base_run(run)}")
    if not run.exists():
        raise SettingsError(f"{run} does not exist: give the folder of a run, the --out of crevnet fit")
    if not path.is_file():
        raise SettingsError(f"{run} is not a run's folder, it has no config.yaml: give the --out of crevnet fit")
    from crevnet.machine.parser import Parser  # imports jsonargparse, which training itself does not need

    parser = Parser(prog="crevnet")
    try:
        add_sections(parser, RunSettings(default_model(model_named_in(path))))
        sections = parser.instantiate(parser.parse_path(str(path)))
        return RunSettings(sections.model, sections.data, sections.training)
    except (SettingsError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error


def _plain(value: object) -> object:
    """A value with lists instead of tuples and text instead of paths."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
