"""The command line: crevnet fit | recipe paper | evaluate | predict | figures | submit | score | show | data synth |
data moving-mnist | data repack | data holdout.

What each does is in `commands` and `competition.commands`, its options in `options`.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from crevnet.competition.settings import ChallengeSettings
from crevnet.data import DataError
from crevnet.defaults import value_of
from crevnet.machine.errors import SettingsError
from crevnet.machine.processes import is_first, is_first_to_fail
from crevnet.machine.shortages import lack_of
from crevnet.options import make_parser
from crevnet.recipe.settings import RecipeSettings
from crevnet.settings import RunSettings
from crevnet.training.failures import TrainingError, warned

_SHORT = re.compile(r"--model(=.*)?")
"""jsonargparse takes --model itself, for a file with the model's values alone; here it is short for --model.name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error is one line on stderr and exit status 2; 1 for what the machine lacks, such as room on a disk."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for names of files that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    errors = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first())
    warnings.showwarning = lambda message, *_, **__: errors.print(f"[yellow]warning:[/] {escape(warned(message))}")
    try:
        _run(sys.argv[1:] if arguments is None else list(arguments))
    except TrainingError as error:
        _fail(str(error), error.exit_status)
    except (SettingsError, DataError) as error:
        _fail(str(error), 2)
    except OverflowError as error:  # of the grid that streams live on in exact arithmetic
        _fail(f"{error}; a model's bits are its --model.exact_bits", 2)
    except UnicodeEncodeError as error:  # of TensorBoard, say
        _fail(f"{error.object!a} is no name in UTF-8, and not all that is to read or write it can: rename it", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (MemoryError, OSError, RuntimeError) as error:
        lack = lack_of(error)
        if lack is not None:
            _fail(lack, 1)
        if not isinstance(error, OSError):
            raise
        _fail(str(error), 2)


def _fail(message: str, status: int) -> NoReturn:
    """End with a line on stderr; of several processes that train together, the first that fails says its."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first_to_fail())
    errors.print(f"[red]crevnet:[/] {escape(message)}")
    sys.exit(status)


def _run(arguments: list[str]) -> None:
    arguments = [
        _SHORT.sub(r"--model.name\1", argument) if _SHORT.fullmatch(argument) else argument for argument in arguments
    ]
    command, options = _parsed(arguments)
    from crevnet import commands  # Lightning takes seconds to import: not for --help or a mistyped option
    from crevnet.competition import commands as competition

    commands.console.quiet = not is_first()
    chosen = options[command]
    if command == "fit":
        settings = RunSettings(chosen.model, chosen.data, chosen.training)
        commands.fit(settings, chosen.resume or chosen.out, resume=chosen.resume is not None)
    elif command == "recipe":
        of = chosen.paper
        base = RunSettings(of.model, of.data, of.training)
        commands.recipe(of.out, RecipeSettings(base, of.city, of.frame))
    elif command == "evaluate":
        commands.evaluate(chosen.run, chosen.data, chosen.checkpoint, chosen.feedback, chosen.ensemble, chosen.json)
    elif command == "predict":
        when = (chosen.city, chosen.date, chosen.slot)
        out = chosen.out or chosen.run
        commands.predict(chosen.run, chosen.data, chosen.checkpoint, chosen.feedback, *when, chosen.channel, out)
    elif command == "figures":
        out = chosen.out or chosen.run / "figures"
        commands.draw(chosen.run, chosen.data, chosen.checkpoint, chosen.feedback, out)
    elif command == "show":
        commands.show(chosen.path, chosen.slot, chosen.out)
    elif command == "submit":
        how = (chosen.test, chosen.checkpoint, chosen.feedback)
        competition.submit(
            chosen.run, chosen.weights, _challenge(chosen), chosen.data, *how, chosen.out, chosen.overwrite
        )
    elif command == "score":
        competition.score(chosen.submission, _challenge(chosen), chosen.truth, chosen.data, chosen.json)
    elif chosen.command == "repack":
        commands.repack_data(chosen.repack.source, chosen.repack.target)
    elif chosen.command == "holdout":
        made = chosen.holdout
        competition.hold_out(_challenge(made), made.data, made.count, made.seed, made.out)
    elif chosen.command == "moving-mnist":
        commands.moving_mnist(chosen["moving-mnist"].root, chosen["moving-mnist"].movies)
    else:
        commands.synth(chosen.synth.root, chosen.synth.city)


def _parsed(arguments: list[str]) -> tuple[str, Any]:
    """The command, and the options of all commands. SettingsError for what is wrong, with the configuration file's name if
    it is wrong there: where the same command line without the file has not the same error."""
    try:
        return _parsed_as_they_are(arguments)
    except SettingsError as error:
        config = value_of("--config", arguments)
        if config is None or _error_of(_without("--config", arguments)) == str(error):
            raise
        raise SettingsError(f"--config {config}: {error}") from error


def _parsed_as_they_are(arguments: list[str]) -> tuple[str, Any]:
    parser = make_parser(arguments)
    try:
        parsed = parser.parse_args(arguments)
        return parsed.command, parser.instantiate(parsed)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _error_of(arguments: list[str]) -> str | None:
    try:
        _parsed_as_they_are(arguments)
    except SettingsError as error:
        return str(error)
    return None


def _without(option: str, arguments: list[str]) -> list[str]:
    """The command line without an option and its value."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [a for before, a in pairs if before != option and a != option and not a.startswith(f"{option}=")]


def _challenge(options: Any) -> ChallengeSettings:
    return ChallengeSettings(options.task, options.slots)


if __name__ == "__main__":
    main()
