"""The paper's experiment, at a size that two CPU cores train.

    python bench/experiment.py cities          # three synthetic cities
    python bench/experiment.py air-traffic     # real movement, in full frames

It trains the recipe stage by stage, as in the paper's table 1. It also compares CrevNet with ConvLSTM, PredRNN and U-Net, at
equal memory and equal time of training.

The same command continues after a stop at any point. `--seeds 3` adds the seeds that are missing. The models' sizes, steps and
learning rates are found once (bench/kit/experiment_plan.py). Each seed then trains the recipe and the other models. For
comparison with fine-tuning, it also trains the recipe's single model for as long again. All scores are on the same validation
windows, which have also chosen the checkpoints of every model. One thread is used, so two data sets can run in parallel on two
cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from crevnet.data.errors import DataError
from crevnet.data.made.synthetic import SyntheticCity, write_city
from crevnet.evaluation.comparison import compare
from crevnet.evaluation.scores import Scores, mean_over_cities
from crevnet.machine.errors import SettingsError
from crevnet.machine.files import replace_file
from crevnet.traffic4cast.recipe.paper import Recipe, Step
from crevnet.traffic4cast.recipe.settings import RecipeSettings, read_recipe
from crevnet.training.failures import StoppedError, TrainingError
from kit.experiment_plan import CREVNET, Plan, load_plan
from pages.experiment_tables import COLUMNS, MODELS, STAGES, TRAINED_ON, UNTRAINED, Row, page, print_tables
from pages.report import add_outputs, positive, write

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
CITIES = {"Berlin": 1, "Istanbul": 2, "Moscow": 3}
"""Names and seeds of the synthetic cities."""
TUNED = 10
"""Fine-tuning has a learning rate that is this many times lower."""


@dataclass(frozen=True)
class DataSet:
    """The data of an experiment.

    Attributes:
        recipe: its settings, in configs/recipes/.
        make: writes the data to a folder, if they do not exist as files.
        minutes: of training for each model, on one core.
    """

    recipe: Path
    make: Callable[[Path], None] | None
    minutes: float

    def settings(self, folder: Path) -> RecipeSettings:
        """The settings of the file. The data are made if necessary."""
        found = read_recipe(self.recipe)
        if self.make is None:
            return found
        self.make(folder / "data")
        data = replace(found.base.data, root=folder / "data")
        model = replace(found.base.model, memory_budget="min")  # type: ignore[call-arg]
        return replace(found, base=replace(found.base, model=model, data=data))


def make_cities(root: Path) -> None:
    for name, seed in CITIES.items():
        write_city(SyntheticCity(name, 96, 80, training_days=6, validation_days=2, seed=seed), root)


DATA = {
    "cities": DataSet(RECIPES / "cities.yaml", make_cities, minutes=5),
    "air-traffic": DataSet(RECIPES / "air-traffic.yaml", None, minutes=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA, help="data set")
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds, from 0 on (1)")
    minutes = ", ".join(f"{name}: {data.minutes}" for name, data in DATA.items())
    parser.add_argument(
        "--minutes", type=float, help=f"training time per model on one core without fine-tuning, minutes ({minutes})"
    )
    parser.add_argument("--out", type=Path, help="folder of the experiment (runs/experiment/DATA)")
    add_outputs(parser, figure=False)
    a = parser.parse_args()
    folder = a.out or Path("runs/experiment") / a.data
    torch.set_num_threads(1)
    try:
        rows, plan = experiment(DATA[a.data], folder, a.minutes or DATA[a.data].minutes, range(a.seeds))
    except StoppedError as error:
        print(f"experiment: {error}, or, better, run this command again", file=sys.stderr)
        sys.exit(error.exit_status)
    except (DataError, SettingsError, TrainingError, OSError, ValueError) as error:
        parser.error(str(error))
    print_tables(rows, plan)
    write(a, rows, page(a.data, rows, plan))


def experiment(data: DataSet, folder: Path, minutes: float, seeds: range) -> tuple[list[Row], Plan]:
    """Train and score everything that is missing. Returns every seed's rows."""
    settings = data.settings(folder)
    plan = load_plan(folder, settings.base, minutes)
    rows = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        path = place / "scores.json"
        if not path.is_file():
            store(path, [*Seed(settings, plan, place, seed).rows()])
        rows += [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return rows, plan


def store(path: Path, rows: list[Row]) -> None:
    text = json.dumps([asdict(row) for row in rows], indent=1)
    replace_file(path, lambda file: file.write(text.encode()))


class Seed:
    """All training with one seed, in a folder of its own."""

    def __init__(self, settings: RecipeSettings, plan: Plan, folder: Path, seed: int) -> None:
        self._plan, self._folder, self._name = plan, folder, seed
        runs = {name: planned.run(settings.base, seed) for name, planned in plan.models.items()}
        rate = plan.models[CREVNET].learning_rate / TUNED
        city, frame = (
            replace(tuning, batches=plan.tuning_batches, learning_rate=rate)
            for tuning in (settings.city, settings.frame)
        )
        self._recipe = Recipe(folder / "recipe", RecipeSettings(runs.pop(CREVNET), city, frame))
        base = self._recipe.base
        more = replace(city, epochs=city.epochs + frame.epochs).of(base.settings.training)
        trained_on = replace(base.settings, training=replace(more, start=base.folder))
        others = [Step(name, folder / name, run) for name, run in runs.items()]
        self._compared = {
            CREVNET: base,
            **{step.name: step for step in others},
            TRAINED_ON: Step(TRAINED_ON, folder / "trained-on", trained_on),
        }

    def rows(self) -> Iterator[Row]:
        """Train everything that is missing, and score all on the same windows."""
        steps = [*self._recipe.steps(), *list(self._compared.values())[1:]]
        for number, step in enumerate(steps, 1):
            if step.score is None:
                print(f"seed {self._name}, {number} of {len(steps)}: {step.name}", flush=True)
                step.run()
        for stage, scores in self._recipe.scores().items():
            yield self._row(STAGES if stage in COLUMNS else UNTRAINED, stage, scores)
        folders = [step.folder for step in self._compared.values()]
        found = compare(folders, self._recipe.base.settings.data, "best", None, ensemble=False)
        scored = mean_over_cities(found.by_city).values()  # the runs' come first, in their order
        for name, scores in zip(self._compared, scored, strict=False):
            yield self._row(MODELS if name in self._plan.models else STAGES, name, scores)

    def _row(self, table: str, name: str, scores: Scores) -> Row:
        return Row(table, name, self._name, scores.mse, scores.mse_by_horizon)


if __name__ == "__main__":
    main()
