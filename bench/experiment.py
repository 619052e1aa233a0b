"""The paper's experiment, at a size that two CPU cores train: its recipe stage by stage, as in its table 1, and CrevNet beside
ConvLSTM, PredRNN and U-Net at equal memory and equal time of training.

    python bench/experiment.py cities          # three synthetic cities
    python bench/experiment.py air-traffic     # real movement, in full frames

Stopped at any point, the same command goes on; `--seeds 3` adds the seeds that are missing. The models' sizes, steps and learning
rates are found once (bench/experiment_plan.py); each seed then trains the recipe, the other models, and, for comparison with
fine-tuning, the recipe's single model once more for as long. Everything is scored on the same validation windows, by which the
checkpoints have been chosen, too, of every model alike. One thread is used: two data sets run side by side on two cores.
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
from experiment_plan import CREVNET, Plan, load_plan
from experiment_tables import COLUMNS, MODELS, STAGES, TRAINED_ON, UNTRAINED, Row, page, print_tables
from report import add_outputs, positive, write

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
CITIES = {"Berlin": 1, "Istanbul": 2, "Moscow": 3}
"""Names and seeds of the synthetic ones."""
TUNED = 10
"""Fine-tuning goes at so many times a lower rate."""


@dataclass(frozen=True)
class DataSet:
    """What an experiment is made on.

    Attributes:
        recipe: its settings, in configs/recipes/.
        make: writes the data to a folder, where they are not there as files.
        minutes: of training for each model, on one core.
    """

    recipe: Path
    make: Callable[[Path], None] | None
    minutes: float

    def settings(self, folder: Path) -> RecipeSettings:
        """Those of the file, and the data, made if they are to be."""
        found = read_recipe(self.recipe)
        if self.make is None:
            return found
        self.make(folder / "data")
        data = replace(found.base.data, root=folder / "data")
        return replace(found, base=replace(found.base, data=data))


def make_cities(root: Path) -> None:
    for name, seed in CITIES.items():
        write_city(SyntheticCity(name, 96, 80, training_days=6, validation_days=2, seed=seed), root)


DATA = {
    "cities": DataSet(RECIPES / "cities.yaml", make_cities, minutes=5),
    "air-traffic": DataSet(RECIPES / "air-traffic.yaml", None, minutes=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--seeds", type=positive, default=1, help="how many: 0, 1, ...")
    parser.add_argument(
        "--minutes", type=float, help="minutes of training per model on one core, without the fine-tuning"
    )
    parser.add_argument("--out", type=Path, help="the experiment's folder; runs/experiment/DATA if not given")
    add_outputs(parser, figure=False)
    a = parser.parse_args()
    folder = a.out or Path("runs/experiment") / a.data
    torch.set_num_threads(1)
    try:
        rows, plan = experiment(DATA[a.data], folder, a.minutes or DATA[a.data].minutes, range(a.seeds))
    except StoppedError as error:
        print(f"experiment: {error}, or, better, give this command again", file=sys.stderr)
        sys.exit(error.exit_status)
    except (DataError, SettingsError, TrainingError, OSError, ValueError) as error:
        parser.error(str(error))
    print_tables(rows, plan)
    write(a, rows, page(a.data, rows, plan))


def experiment(data: DataSet, folder: Path, minutes: float, seeds: range) -> tuple[list[Row], Plan]:
    """Train and score whatever has not been yet. Returns every seed's rows."""
    settings = data.settings(folder)
    plan = load_plan(folder, settings.base, minutes)
    rows = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        path = place / "scores.json"
        if not path.is_file():
            text = json.dumps([asdict(row) for row in Seed(settings, plan, place, seed).rows()], indent=1)
            replace_file(path, lambda file, text=text: file.write(text.encode()))
        rows += [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return rows, plan


class Seed:
    """All that is trained with one seed, in a folder of its own."""

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
        """Train whatever has not been, and score everything on the same windows."""
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
