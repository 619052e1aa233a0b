"""The options of a competition's challenge, and of its data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.data.files.protocol import ProtocolName
from crevnet.data.settings import DataSettings
from crevnet.traffic4cast.settings import ChallengeSettings, Task
from crevnet.training.settings import RunSettings, with_protocol


def add_challenge(parser: CommandParser) -> None:
    parser.add_option("--task", type=Task, default="temporal", help="Challenge of 2021")
    parser.add_option(
        "--slots",
        type=list[int] | None,
        default=None,
        help="First predicted time slots in cities other than Berlin, Istanbul and Moscow (2019)",
    )


def add_protocol(parser: CommandParser) -> None:
    parser.add_option("--protocol", type=ProtocolName, default="2019", help="Competition, by its year")
    data = with_protocol(RunSettings(), parser.value_of("--protocol")).data
    parser.add_class_arguments(DataSettings, "data", default=asdict(data))
    parser.list_in_help("data.root", "data.cities")


def challenge_of(options: Any) -> ChallengeSettings:
    return ChallengeSettings(options.task, options.slots)


def score_command(data: DataSettings, challenge: ChallengeSettings) -> str:
    """The beginning of the command that scores a submission."""
    return f"crevnet score --protocol {data.protocol}{same_options(data, challenge)}"


def same_options(data: DataSettings, challenge: ChallengeSettings) -> str:
    """The challenge's options that the next command needs, too."""
    if data.protocol == "2021":
        return f" --task {challenge.task}"
    return f" --slots '{[*challenge.slots]}'" if challenge.slots else ""
