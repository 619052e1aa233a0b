"""Train the paper's recipe: one model of all cities, fine-tuned on each city, and each of those on each predicted frame. If
interrupted, the same command continues. A table of the scores ends it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import SCORING, console, print_tables
from crevnet.cli.starting import COMMON, add_model_name, add_start, run_defaults
from crevnet.machine.processes import go_alone, is_first
from crevnet.traffic4cast.recipe.settings import RecipeSettings, add_recipe, load_recipe
from crevnet.training.recipe_folders import is_recipe, scores_file
from crevnet.training.settings import RunSettings, save_yaml


def add_options(parser: CommandParser) -> None:
    add_start(parser)
    parser.add_option("--out", type=Path, default=Path("runs/recipe"), help="Folder of the recipe")
    add_recipe(parser, _defaults(parser))
    add_model_name(parser)
    for name in ("city", "frame"):
        parser.name_section(name, f"Fine-tuning on each {name}")
        parser.list_in_help(f"{name}.epochs")
    parser.list_in_help(*COMMON)


def _defaults(parser: CommandParser) -> RecipeSettings:
    """The settings of the recipe that was begun in the folder; else those of a new run."""
    out = parser.value_of("--out")
    if out is not None and is_recipe(Path(out)):
        return load_recipe(Path(out))
    return RecipeSettings(run_defaults(parser))


def run(options: Any) -> None:
    from crevnet.cli.score_table import score_tables
    from crevnet.traffic4cast.recipe.paper import Recipe

    base = RunSettings(options.model, options.data, options.training)
    recipe = Recipe(options.out, RecipeSettings(base, options.city, options.frame))
    steps = list(recipe.steps())
    for number, step in enumerate(steps, 1):
        where = f"{number} of {len(steps)}, {step.name}"
        if step.score is None:
            console.print(f"{where}: {'continuing' if step.is_begun else 'training'} in {step.folder}")
            step.run()
        console.print(f"{where}: best validation {base.model.score_name} {step.score:.4e}")
    go_alone()  # or the first process would score only its share of the windows
    if not is_first():
        return
    with console.status(SCORING):
        scores = recipe.scores()
    print_tables(score_tables(scores, base.model.channels, recipe.frames, recipe.data.layout, console.width))
    save_yaml(scores_file(options.out), {name: asdict(found) for name, found in scores.items()})
    console.print(f"wrote {scores_file(options.out)}")
