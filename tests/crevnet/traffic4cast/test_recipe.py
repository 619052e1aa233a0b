"""The paper's recipe on two small cities: what each model begins with, where it goes on, and the scores of its table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import revflow
from crevnet import CrevNet, CrevNetConfig
from crevnet.data.errors import DataError
from crevnet.data.files.protocol import protocol
from crevnet.machine.errors import SettingsError
from crevnet.networks.baselines import vpn
from crevnet.traffic4cast.recipe.paper import Recipe
from crevnet.traffic4cast.recipe.settings import FineTuning, RecipeSettings, load_recipe
from crevnet.training.checkpoint_reading import checkpoint_path, load_checkpoint, load_network
from crevnet.training.failures import DivergedError, explained
from crevnet.training.recipe_folders import begun_runs
from crevnet.training.settings import load_settings
from crevnet.training.task import FusedAdam

CONFIGS = Path(__file__).parents[3] / "configs"

CITIES, FRAMES = ("Here", "There"), (1, 2)
STEPS = ["base", "city/Here", "city/There", *(f"frame/{c}/{k}" for c in CITIES for k in FRAMES)]


@pytest.fixture(scope="module")
def options(cities, small):
    once = [f"--{section}.{name}=1" for section in ("training", "city", "frame") for name in ("epochs", "batches")]
    return (
        "recipe",
        "paper",
        *small,
        f"--data.root={cities}",
        "--data.batch_size=4",
        *once,
        "--training.learning_rate=1e-2",
        "--city.learning_rate=1e-2",
        "--frame.learning_rate=1e-2",
    )


@pytest.fixture
def trained(monkeypatch):
    """The folders whose training begins, or goes on; `fail_at` raises where it says."""
    from crevnet.traffic4cast.recipe import paper

    found, train = [], paper.train

    def noted(settings, folder, resume):
        found.append((str(folder), resume))
        if len(found) == noted.fail_at:
            raise KeyboardInterrupt
        return train(settings, folder, resume)

    noted.fail_at = None
    monkeypatch.setattr(paper, "train", noted)
    return found, noted


def weights(folder, which="best"):
    return load_checkpoint(folder, which)["state_dict"]


def forecasts(folder, frames, roads):
    network = load_network(folder, load_settings(folder).model, "best").eval()
    return network.generate(frames[:, :3], roads)


def test_a_recipe_that_is_stopped_goes_on_and_ends_with_its_table(options, trained, crevnet, points, tmp_path):
    out = tmp_path / "recipe"
    found, train = trained
    train.fail_at = 4
    with pytest.raises(SystemExit) as stop:
        crevnet(*options, "--out", out)
    assert stop.value.code == 130
    assert found == [(str(out / step), False) for step in STEPS[:4]]
    before = {step: weights(out / step) for step in STEPS[:3]}

    rows = [line.split() for line in crevnet("show", out).splitlines() if "e-0" in line or "trained" in line]
    shown = [(row[1], row[3]) for row in rows]
    expected = [
        (step, f"{yaml.safe_load((out / step / 'finished.yaml').read_text())['score']:.4e}") for step in STEPS[:3]
    ]
    assert shown == expected
    assert f"next: crevnet recipe paper --out {out}" in crevnet("show", out)

    # Killed between the end of training and its record: the step goes on, and has nothing left to do.
    (out / "city" / "There" / "finished.yaml").unlink()
    found.clear()
    train.fail_at = None
    said = crevnet("recipe", "paper", "--out", out)  # with the options that it was begun with
    assert found == [(str(out / "city/There"), True)] + [(str(out / step), False) for step in STEPS[3:]]
    for step, state in before.items():
        assert all(torch.equal(state[name], value) for name, value in weights(out / step).items())

    # Every score of the table, from the runs' networks and the arrays.
    errors = {name: [] for name in ("single", "city", "frame", "final")}
    for city, training, validation in (("Here", (0, 1), 2), ("There", (3,), 4)):
        days = np.concatenate([points(seed) for seed in training])
        roads = torch.from_numpy(days.any(-1).mean(0).astype(np.float32))[None, None].expand(4, -1, -1, -1)
        array = points(validation).transpose(0, 3, 1, 2) / np.float32(255)
        frames = torch.from_numpy(np.stack([array[start : start + 5] for start in (0, 5, 10, 15)]))
        base, tuned, *framed = (
            forecasts(out / folder, frames, roads)
            for folder in ("base", f"city/{city}", *(f"frame/{city}/{k}" for k in FRAMES))
        )
        joined = torch.stack([framed[0][:, 0], framed[1][:, 1]], 1)
        final = (base + tuned + joined) / 3
        for name, forecast in zip(errors, (base, tuned, joined, final), strict=True):
            errors[name].append((forecast.clamp(0, 1) - frames[:, 3:]).double().square().mean().item())
    scores = yaml.safe_load((out / "scores.yaml").read_text())
    names = ("single model", "fine-tuned on each city", "fine-tuned on each time step", "final model")
    for name, expected in zip(names, errors.values(), strict=True):
        assert scores[name]["mse"] == pytest.approx(np.mean(expected), rel=1e-5), name
        assert name in said
    assert len({scores[name]["mse"] for name in names}) == 4 and "zeros" in scores

    assert f"next: crevnet submit {out}" in crevnet("show", out)

    found.clear()
    assert "7 of 7, frame 2, There: best validation MSE" in crevnet("recipe", "paper", "--out", out)
    assert not found


def test_each_model_begins_with_the_one_before(settings, tmp_path):
    tuning = FineTuning(epochs=3, batches=7, learning_rate=1e-5)
    recipe = Recipe(tmp_path, RecipeSettings(settings, city=tuning))
    assert [str(step.folder.relative_to(tmp_path)) for step in recipe.steps()] == STEPS
    assert recipe.base.settings == settings
    city = recipe.city("There").settings
    training = replace(settings.training, epochs=3, batches=7, learning_rate=1e-5, start=tmp_path / "base")
    assert city.training == training and city.data == replace(settings.data, cities=["There"])
    frame = recipe.frame("There", 2).settings
    assert frame.data == city.data and frame.training.start == tmp_path / "city" / "There"
    assert (frame.training.loss, frame.training.sampling_steps, frame.training.epochs) == (2, 0, 10)
    assert load_recipe(tmp_path) == recipe.settings


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"city": FineTuning(epochs=4)}, "city.epochs 10, now it is 4"),
        ({"frame": FineTuning(learning_rate=1.0)}, "frame.learning_rate 2e-05, now it is 1.0"),
    ],
)
def test_a_recipe_that_was_begun_keeps_its_settings(change, named, settings, tmp_path):
    Recipe(tmp_path, RecipeSettings(settings))
    with pytest.raises(SettingsError, match=named):
        Recipe(tmp_path, RecipeSettings(settings, **change))
    other = replace(settings, model=replace(settings.model, modules=3))
    with pytest.raises(SettingsError, match=r"model\.modules 2, now it is 3"):
        Recipe(tmp_path, RecipeSettings(other))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("recipe",), "command"),
        (("recipe", "soup"), "soup"),
        (("recipe", "paper", "--city.epochs=0"), "epochs"),
        (("recipe", "paper", "--protocol=movies"), "train with crevnet fit"),
        (("recipe", "paper", "--data.protocol=movies"), "train with crevnet fit"),
        (("recipe", "paper", "--training.loss=2"), "use --training.loss all"),
        (("recipe", "paper", "--frame.learning_rate=-1"), "learning_rate"),
        (("recipe", "paper", "--out=OUT"), "--data.root"),
    ],
)
def test_what_cannot_be(arguments, named, failing, tmp_path):
    assert named in failing(*(argument.replace("OUT", str(tmp_path / "out")) for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_not_into_a_run(run, options, failing):
    assert str(run) in failing(*options, "--out", run)


def test_a_damaged_recipe_is_named(options, cities, failing, tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: [")
    assert str(tmp_path / "recipe.yaml") in failing(*options, "--out", tmp_path)


@pytest.mark.parametrize(
    "arguments", [("evaluate",), ("predict",), ("fit", "--resume"), ("fit", "--training.start"), ("fit", "--out")]
)
def test_a_recipe_is_no_run(arguments, settings, small, cities, failing, tmp_path):
    recipe, new = tmp_path / "recipe", tmp_path / "new"
    Recipe(recipe, RecipeSettings(settings))
    fit = (*small, "--data.root", cities, "--training.batches=1", "--training.epochs=1")
    others = {"fit --training.start": (*fit, "--out", new), "fit --out": fit}
    line = failing(*arguments, recipe, *others.get(" ".join(arguments), ()))
    assert f"{recipe} is a recipe's folder" in line
    assert not new.exists() and [path.name for path in recipe.iterdir()] == ["recipe.yaml"]


def test_a_model_that_cannot_forecast_is_refused_before_it_is_trained(options, failing, monkeypatch, tmp_path):
    monkeypatch.setattr(vpn, "MOST_GENERATED", 100)
    others = [
        option for option in options if not option.startswith(("--model.blocks", "--model.strides", "--model.modules"))
    ]
    assert "choose another --model" in failing(*others, "--model", "vpn", "--out", tmp_path / "recipe")
    assert not list(tmp_path.iterdir())


def test_runs_are_shown_by_the_names_of_cities_and_the_values_of_numbers(tmp_path):
    runs = [tmp_path / name for name in ("city/ANTWERP", "city/BERLIN", "frame/ANTWERP/9", "frame/ANTWERP/12")]
    for run in reversed(runs):
        run.mkdir(parents=True)
    assert begun_runs(tmp_path) == runs


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (DataError("a damaged day"), "crevnet recipe paper --out RECIPE"),
        (SystemExit(), "crevnet recipe paper --out RECIPE"),
        (DivergedError("the loss is nan"), "crevnet fit --resume RUN, then crevnet recipe paper --out RECIPE"),
        (torch.OutOfMemoryError("CUDA"), "crevnet fit --resume RUN, then crevnet recipe paper --out RECIPE"),
    ],
)
@pytest.mark.parametrize("name", ["base", "city/Here", "frame/Here/2"])
def test_what_ends_a_step_names_the_command_that_goes_on_with_the_recipe(name, error, advice, settings, tmp_path):
    Recipe(tmp_path, RecipeSettings(settings))
    last = checkpoint_path(tmp_path / name, "last")
    last.parent.mkdir(parents=True)
    last.touch()
    expected = advice.replace("RECIPE", str(tmp_path)).replace("RUN", str(tmp_path / name))
    assert str(explained(error, settings, last)).endswith(f"with {expected}")


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_complete(path, failing, tmp_path):
    """Each is accepted: all that is wrong is that there are no data."""
    line = failing(
        "recipe", "paper", "--config", path, "--data.root", tmp_path / "absent", "--out", tmp_path / "recipe"
    )
    assert f"{tmp_path / 'absent'}" in line and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_recipe_of_2021_has_the_largest_batch_that_fits():
    config = yaml.safe_load((CONFIGS / "recipes" / "traffic4cast-2021.yaml").read_text())
    asked = protocol("2021")
    model = CrevNetConfig(channels=8, past=asked.past, horizon=asked.horizon, **config["model"])

    def step(batch):
        network = CrevNet(model)
        optimizer = FusedAdam(network.parameters(), 2e-4)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes Adam's state
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = network.loss(torch.rand(batch, model.window, 8, 495, 436), torch.rand(batch, 1, 495, 436))
        loss.backward()
        optimizer.step()

    assert revflow.predict_memory(step).largest_batch(14 * 2**30) == config["data"]["batch_size"]
