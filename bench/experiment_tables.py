"""The tables of an experiment: means over seeds, with the range that they span."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from crevnet.networks.models import MODELS as CREVNETS_MODELS
from crevnet.traffic4cast.recipe.paper import FINAL
from crevnet.traffic4cast.recipe.paper import STAGES as OF_RECIPE
from experiment_plan import Plan
from report import machine, markdown, markdown_table, show

STAGES, MODELS, UNTRAINED = "stages", "models", "untrained"
TRAINED_ON = "single model, trained on for as long"
"""The recipe's, on all cities: what fine-tuning has to be better than."""
COLUMNS = (OF_RECIPE[0], TRAINED_ON, *OF_RECIPE[1:], FINAL)
"""Of the table of stages."""


@dataclass(frozen=True)
class Row:
    """The validation score of one forecast, with one seed: MSE of values in [0, 1], mean over the cities."""

    table: str
    """stages: of the recipe, and the single model trained on; models, which train as long; untrained: forecasts."""
    name: str
    seed: int
    mse: float
    mse_by_horizon: tuple[float, ...]


def print_tables(rows: Sequence[Row], plan: Plan) -> None:
    for title, headings, lines in _tables(rows, plan):
        show(title, headings, lines, left=headings[:1])


def page(name: str, rows: Sequence[Row], plan: Plan) -> str:
    """A page of results."""
    seeds = len({row.seed for row in rows})
    about = (
        f"hardware: CPU alone; {machine(torch.device('cpu'))}\n- {seeds} seed{'s' * (seeds > 1)}; each model trained for "
        f"{plan.minutes:g} minutes on one core"
    )
    tables = [
        f"## {title}\n\n{markdown_table(headings, lines, left=headings[:1])}"
        for title, headings, lines in _tables(rows, plan)
    ]
    return markdown(f"The paper's experiment, small: {name}", about, [ABOUT, *tables])


ABOUT = """MSE of values in [0, 1], forecasts clipped, mean over pixels, channels, horizons and cities, on the validation windows.
Of several seeds, the mean and half the range that they span. The same windows have chosen the checkpoints, of every model
alike."""


def _tables(rows: Sequence[Row], plan: Plan) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Titles, headings and lines."""
    leads = [f"+{5 * number} min" for number in range(1, len(rows[0].mse_by_horizon) + 1)]
    by_name = _by_name(rows, STAGES)
    stages = [name for name in COLUMNS if name in by_name]
    columns = [_scores(by_name[name]) for name in stages]
    lines = [list(line) for line in zip(["MSE", *leads], *columns, strict=True)]
    yield "The recipe, as in the paper's table 1", ["CrevNet", *stages], lines
    headings = ["model", "width", "parameters", "peak, MiB", "s a step", "steps", "learning rate", "MSE", *leads]
    models = [[*_sizes(name, plan), *_scores(found)] for name, found in _by_name(rows, MODELS).items()]
    yield "Models at equal memory and equal time of training", headings, models
    untrained = [[name, *_scores(found)] for name, found in _by_name(rows, UNTRAINED).items()]
    yield "Forecasts that need no training", ["forecast", "MSE", *leads], untrained


def _by_name(rows: Iterable[Row], table: str) -> dict[str, list[Row]]:
    """The seeds' rows of each name, the best first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.table == table:
            found.setdefault(row.name, []).append(row)
    return dict(sorted(found.items(), key=lambda item: statistics.mean(row.mse for row in item[1])))


def _scores(rows: Sequence[Row]) -> list[str]:
    by_horizon = zip(*(row.mse_by_horizon for row in rows), strict=True)
    return [over_seeds([row.mse for row in rows]), *map(over_seeds, by_horizon)]


def over_seeds(values: Sequence[float]) -> str:
    """The mean, in thousandths, and half the range."""
    text = f"{1e3 * statistics.mean(values):.3f}e-3"
    return text if len(values) == 1 else f"{text} ± {1e3 * (max(values) - min(values)) / 2:.3f}e-3"


def _sizes(name: str, plan: Plan) -> list[str]:
    model = plan.models[name]
    return [
        CREVNETS_MODELS[name].config.title,
        "" if model.width is None else str(model.width),
        f"{model.parameters:,}",
        f"{model.peak / 2**20:.1f}",
        f"{model.seconds:.2f}",
        f"{plan.epochs * model.batches:,}",
        f"{model.learning_rate:g}",
    ]
