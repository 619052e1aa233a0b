"""The options that a new run starts from, and the defaults of its settings, which depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from crevnet.cli.command_parser import CommandParser
from crevnet.data.files.protocol import LayoutName
from crevnet.machine.errors import SettingsError
from crevnet.networks.config import PRESETS, ModelName
from crevnet.training.settings import RunSettings, default_model, load_settings, start_named_in, with_protocol

COMMON = (
    "model",
    "model.past",
    "model.horizon",
    "data.root",
    "data.cities",
    "data.batch_size",
    "data.workers",
    "training.epochs",
    "training.learning_rate",
    "training.precision",
)
"""The settings that `--help` lists."""


def add_start(parser: CommandParser) -> None:
    parser.add_config()
    parser.add_option("--preset", type=Literal[tuple(PRESETS)], default="paper", help="Size of CrevNet to start from")
    parser.add_option(
        "--protocol",
        type=LayoutName | None,
        default=None,
        help="Kind of data to start from. A competition sets data, channels and frames; movies are videos without a road map.",
    )


def add_model_name(parser: CommandParser) -> None:
    """Describe --model, which jsonargparse adds with the model's options, as the short form of --model.name."""
    parser.name_section("model", "Model")
    parser.describe("model", "NAME", f"Name of the model: {', '.join(get_args(ModelName))}")


def run_defaults(parser: CommandParser) -> RunSettings:
    """The settings of the run that --resume names; else those of the model, preset and protocol on the command line or in the
    configuration file."""
    run = parser.value_of("--resume")
    if run is not None:
        for option in ("--out", "--preset", "--protocol", "--training.start"):
            if parser.value_of(option) is not None:
                raise SettingsError(f"{option} is for new runs, and {run} has begun: leave it out with --resume")
        return load_settings(Path(run))
    config = parser.value_of("--config")
    file = {} if config is None else start_named_in(Path(config))
    name = parser.value_of("--model.name") or file.get("model.name", "crevnet")
    preset = parser.value_of("--preset")
    if name != "crevnet" and preset is not None:
        raise SettingsError(f"--preset {preset} is a size of crevnet: leave it out with --model {name}")
    size = PRESETS.get(preset or file.get("preset", ""), PRESETS["paper"])
    model = size if name == "crevnet" else default_model(name)
    return with_protocol(RunSettings(model), parser.value_of("--protocol") or file.get("protocol"))
