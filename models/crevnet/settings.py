"""What a run is set up with: the sections of the configuration file, each value an option of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from crevnet.data.files.dates import read_dates
from crevnet.data.files.layouts import LayoutName
from crevnet.data.files.protocol import HeadingOrder, ProtocolName, protocol
from crevnet.data.flips import Flips
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import replace_file
from crevnet.machine.yaml_text import load_yaml
from crevnet.networks.config import CrevNetConfig, Loss, ModelConfig
from crevnet.networks.models import MODELS
from crevnet.training.recipe_folders import base_run, is_recipe

if TYPE_CHECKING:
    from crevnet.parser import Parser


@dataclass(frozen=True)
class DataSettings:
    """Where the frames are, and which of them to use.

    Args:
        root: folder that holds the cities, <root>/<City>/<City>_training/YYYYMMDD_100m_bins.h5 (2019),
            <root>/<CITY>/training/YYYY-MM-DD_<CITY>_8ch.h5 (2021), or movies, <root>/training/*.h5.
        protocol: which of these it holds. Movies are HDF5 files (frames, H, W, C), uint8 or int16 in 0..255, or floating point
            in [0, 1].
        heading_order: of the channels of 2021, whose organisers' own files disagree.
        cities: names of the cities to use; all that are found if not given.
        training_split: which of a city's folders to train on.
        training_dates: train on these days alone, YYYY-MM-DD, a list or a text file of one a line; days that are missing are
            passed over. If not given, all days, but for those of validation_dates where both are of one folder.
        training_slots: train on this range of each day's slots, [first, past-the-last]; the whole day if not given. A movie
            that is shorter is cut where it ends.
        validation_split: which of a city's folders to validate and evaluate on.
        validation_dates: validate on these days alone, as above.
        validation_slots: validate on this range of each day's slots; the whole day if not given.
        validation_windows: strided, one every validation_stride slots; test, those before the five slots of each city that
            2019's competition asks for.
        stride: start a training window every so many slots.
        validation_stride: start a validation window every so many slots; by default windows do not overlap.
        flips: train on mirror images, too: horizontal, east for west, vertical, north for south, or both. Headings are mirrored,
            too. Each epoch draws, for every window, one of its images or the window as it is.
        skip_damaged: leave damaged day files out with a warning, instead of stopping.
        batch_size: windows in a batch.
        workers: processes that read ahead; 0 reads in the training process.
    """

    root: Path | None = None
    protocol: LayoutName = "2019"
    heading_order: HeadingOrder = "ne-se-sw-nw"
    cities: list[str] | None = None
    training_split: str = "training"
    training_dates: list[str] | Path | None = None
    training_slots: tuple[int, int] | None = None
    validation_split: str = "validation"
    validation_dates: list[str] | Path | None = None
    validation_slots: tuple[int, int] | None = None
    validation_windows: Literal["strided", "test"] = "strided"
    stride: int = 1
    validation_stride: int | None = None
    flips: Flips = "none"
    skip_damaged: bool = False
    batch_size: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("stride", "batch_size", "validation_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} has to be at least 1, not {value}")
        if self.cities == []:
            raise ValueError("data.cities names no city: name some, or leave it out for all")
        if self.workers < 0:
            raise ValueError(f"data.workers cannot be negative; got {self.workers}")
        for name in ("training_dates", "validation_dates"):  # a run keeps the dates: a file might change
            object.__setattr__(self, name, read_dates(f"data.{name}", getattr(self, name)))
        for name in ("cities", "training_dates", "validation_dates"):
            if self.protocol == "movies" and getattr(self, name) is not None:
                raise ValueError(f"data.{name} is given, but movies have neither cities nor dates: leave it out")
        if self.validation_windows == "test" and self.protocol != "2019":
            raise ValueError(f"data.validation_windows test is 2019's, and data.protocol {self.protocol}: say strided")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        epochs: passes over the data, or over `batches` of it.
        batches: training batches in an epoch; all of them if not given.
        validation_batches: validation batches after each epoch; all of them if not given.
        learning_rate: Adam's.
        loss: "all" predictions of a window; those of the "future" frames alone; "padded": all of them with padding and road
            map, as in the authors' code, for CrevNet alone; or a number: of that future frame alone, 1 being the first, by
            which checkpoints are compared then too.
        start: begin with the best weights of the run in this folder, instead of random ones.
        sampling_steps: scheduled sampling (Bengio et al. 2015): future frames are fed to the model with a probability that
            falls linearly from 1 to 0 over so many steps of the optimizer, and else its own predictions; 0 feeds predictions
            from the beginning. Without it the true frames are always fed. Not for unet and vpn.
        accumulate: batches whose gradients are added up before each step of the optimizer.
        precision: Lightning's name for it: 32-true, 16-mixed (V100), bf16-mixed, 64-true.
        max_minutes: stop after so many minutes of training, resumed runs counted in, wherever it is.
        accelerator: Lightning's name for it: auto, cpu, gpu.
        devices: number of devices to train on in each machine. data.batch_size is that of each of them; torchrun's number of
            processes counts instead where it starts them.
        seed: of the initial weights and the order of the windows.
        channels_last: convolutions in the layout that tensor cores work in; the same values up to rounding.
        compile: run the network's parts by torch.compile, which takes minutes in the first steps; the same values up to
            rounding. Not with exact_bits.
        checkpoint_minutes: write last.ckpt after so many minutes of training, and after each epoch.
        nodes: number of machines that train together; each runs the same command.
        strategy: how several devices train together: ddp, each with a copy of everything, or fsdp, each with a part of the
            parameters, which are gathered for each step, and of Adam's state; auto is ddp.
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
                raise ValueError(f"training.{name} has to be at least 1, not {value}")
        for name in ("learning_rate", "max_minutes", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise ValueError(f"training.{name} has to be positive and below a million, not {value}")
        if self.strategy == "fsdp" and self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"training.strategy fsdp knows training.precision 32-true and bf16-mixed, not {self.precision}: take one, or ddp"
            )
        if self.sampling_steps is not None and self.sampling_steps < 0:
            raise ValueError(f"training.sampling_steps cannot be negative; got {self.sampling_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed has to be from 0 to 4294967295, not {self.seed}")


@dataclass(frozen=True)
class RunSettings:
    """All of a run's settings, kept as config.yaml in its folder."""

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
                f"training.sampling_steps is not for {self.model.name}, which is never fed what it predicted: leave it out"
            )
        if self.training.compile and isinstance(self.model, CrevNetConfig) and self.model.exact_bits is not None:
            raise SettingsError(
                "training.compile rounds otherwise in the backward pass than in the forward pass, and model.exact_bits is there "
                "to have no such difference: choose one of them"
            )

    def save(self, folder: Path) -> None:
        save_yaml(folder / "config.yaml", asdict(self))


def save_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write values as YAML, tuples and paths as it knows them; the folder is made where it is missing."""
    text = yaml.safe_dump(_plain(values), sort_keys=False)
    replace_file(path, lambda file: file.write(text.encode()))


def with_protocol(settings: RunSettings, name: str | None) -> RunSettings:
    """The settings with what a competition, or a folder of movies, asks for; as they are where none, or no such, is named."""
    model, data = settings.model, settings.data
    if name == "movies":
        return replace(settings, model=replace(model, static=()), data=replace(data, protocol=name))
    if name not in get_args(ProtocolName):
        return settings
    asked = protocol(name)
    model = replace(model, channels=len(asked.channels), past=asked.past, horizon=asked.horizon, static=("road_map",))
    # 2019 asks for slots, 2021 has all its days in one folder
    parted = {"validation_windows": "test"} if name == "2019" else {"validation_split": "training"}
    return replace(settings, model=model, data=replace(data, protocol=name, **parted))


def add_sections(parser: Parser, defaults: RunSettings) -> None:
    """Options for every value of a run's settings, of the model that the defaults name."""
    parser.add_class_arguments(type(defaults.model), "model", default=asdict(defaults.model))
    parser.add_class_arguments(DataSettings, "data", default=asdict(defaults.data))
    parser.add_class_arguments(TrainingSettings, "training", default=asdict(defaults.training))


def default_model(name: str) -> ModelConfig:
    """The model of that name, in its paper's size. Raises SettingsError for a name that there is not."""
    if name not in MODELS:
        raise SettingsError(f"there is no model {name}: choose one of {', '.join(MODELS)}")
    return MODELS[name].config()


def start_named_in(path: Path) -> dict[str, str]:
    """The preset, the protocol and the model.name that a configuration file names; none where it cannot be read."""
    try:
        found = load_yaml(path)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    values = found if isinstance(found, dict) else {}
    model = values.get("model")
    values |= {"model.name": model.get("name") if isinstance(model, dict) else None}
    return {name: str(values[name]) for name in ("preset", "protocol", "model.name") if values.get(name) is not None}


def model_named_in(path: Path) -> str:
    """The name in a configuration file's section for the model; CrevNet's where it has none, or cannot be read."""
    return start_named_in(path).get("model.name", "crevnet")


def load_settings(run: Path) -> RunSettings:
    """The config.yaml of a run's folder. Raises SettingsError where it is missing or wrong."""
    path = run / "config.yaml"
    if is_recipe(run):
        raise SettingsError(f"{run} is a recipe's folder, not a run's: name one of its runs, {base_run(run)} say")
    if not run.exists():
        raise SettingsError(f"{run} does not exist: give the folder of a run, the --out of crevnet fit")
    if not path.is_file():
        raise SettingsError(
            f"{run} is no run's folder, it has no config.yaml: give one that crevnet fit wrote, its --out"
        )
    from crevnet.parser import Parser  # needs jsonargparse, which training itself does not

    parser = Parser(prog="crevnet")
    try:
        add_sections(parser, RunSettings(default_model(model_named_in(path))))
        sections = parser.instantiate(parser.parse_path(str(path)))
        return RunSettings(sections.model, sections.data, sections.training)
    except (SettingsError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error


def _plain(value: object) -> object:
    """Tuples and paths as YAML knows them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
