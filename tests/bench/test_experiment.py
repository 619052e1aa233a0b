"""bench/experiment.py at toy size: three synthetic cities, the whole recipe, and the other models beside it."""

import json
import math
from dataclasses import replace

import pytest
import yaml

import experiment
from crevnet.data.made.synthetic import SyntheticCity, write_city
from crevnet.traffic4cast.recipe.paper import FINAL, STAGES
from crevnet.training.checkpoint_reading import load_checkpoint
from crevnet.training.settings import load_settings
from kit.experiment_plan import CREVNET, RATES, TUNING, Plan, Planned, TrainingStep, settings_of
from pages.experiment_tables import MODELS, TRAINED_ON, UNTRAINED, Row, page
from pages.experiment_tables import STAGES as STAGES_TABLE

BASELINES = ["convlstm", "predrnn", "unet"]


def make_cities(root):
    for name, seed in experiment.CITIES.items():
        write_city(SyntheticCity(name, 32, 32, training_days=1, validation_days=1, seed=seed), root)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The experiment's recipe, but with 3 + 2 frames, on few windows of small cities, for a moment."""
    values = yaml.safe_load(experiment.DATA["cities"].recipe.read_text())
    values["model"].update(past=3, horizon=2)
    values["data"].update(validation_stride=140)
    values["training"].update(epochs=2)
    for tuning in ("city", "frame"):
        values[tuning].update(epochs=1)
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return experiment.DataSet(path, make_cities, minutes=1e-3)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    rows, plan = experiment.experiment(data, folder, data.minutes, range(1))
    return folder, rows, plan


def test_everything_is_scored(done):
    _, rows, _ = done
    names = {table: [row.name for row in rows if row.table == table] for table in (STAGES_TABLE, MODELS, UNTRAINED)}
    assert names[MODELS] == [CREVNET, *BASELINES]
    assert {*names[STAGES_TABLE]} == {*STAGES, FINAL, TRAINED_ON}
    assert {"zeros", "last frame", "mean of the slot"} <= {*names[UNTRAINED]}
    scores = {(row.table, row.name): row.mse for row in rows}
    # twice the same model: once by the recipe, once beside the others
    assert scores[MODELS, CREVNET] == pytest.approx(scores[STAGES_TABLE, STAGES[0]], rel=1e-6)
    assert len(set(scores.values())) == len(scores) - 1
    assert all(math.fsum(row.mse_by_horizon) / 2 == pytest.approx(row.mse) for row in rows)


def test_models_are_as_wide_as_crevnets_memory_allows(data, done):
    folder, _, plan = done
    base = data.settings(folder).base
    for name in BASELINES:
        planned = plan.models[name]
        wider = TrainingStep(settings_of(name, planned.width + 1, base), 32, 32).peak()
        assert planned.peak <= plan.models[CREVNET].peak < wider, name


def test_models_take_as_many_steps_as_their_pace_allows(done):
    folder, _, plan = done
    for name, planned in plan.models.items():
        assert planned.batches == max(1, round(60e-3 / planned.seconds / 2)), name
        run = folder / "seed-0" / ("recipe/base" if name == CREVNET else name)
        assert load_checkpoint(run, "last")["global_step"] == 2 * planned.batches, name
        assert load_settings(run).training.learning_rate == planned.learning_rate
        assert planned.scores[planned.learning_rate] == min(planned.scores.values()) and [*planned.scores] == [*RATES]


def test_what_fine_tuning_is_compared_with_goes_on_from_the_single_model_for_as_long(done):
    folder, _, plan = done
    seed = folder / "seed-0"
    more, city, frame = (
        load_settings(seed / run).training for run in ("trained-on", "recipe/city/Moscow", "recipe/frame/Moscow/2")
    )
    assert more.start == seed / "recipe" / "base" and load_settings(seed / "trained-on").data.cities is None
    assert more.epochs == city.epochs + frame.epochs == 2
    assert more.batches == city.batches == frame.batches == max(1, 2 * plan.models[CREVNET].batches // TUNING)
    assert more.learning_rate == city.learning_rate == frame.learning_rate == plan.models[CREVNET].learning_rate / 10


def test_the_same_command_trains_what_is_missing_alone(data, done, monkeypatch):
    folder, rows, plan = done
    trained = []
    monkeypatch.setattr(experiment.Step, "run", lambda step: trained.append(step.name))
    assert experiment.experiment(data, folder, data.minutes, range(1)) == (rows, plan)
    assert not trained
    (folder / "seed-0" / "scores.json").rename(folder / "scores.json")
    (folder / "seed-0" / "unet" / "finished.yaml").unlink()
    again, _ = experiment.experiment(data, folder, data.minutes, range(1))
    assert trained == ["unet"] and again == rows
    (folder / "scores.json").unlink()


def test_another_time_of_training_needs_another_folder(data, done):
    with pytest.raises(ValueError, match=r"0\.001 minutes per model, not 1: choose another --out"):
        experiment.experiment(data, done[0], 1, range(1))


def test_seeds_are_averaged(monkeypatch):
    planned = Planned(CREVNET, None, 1_234, 3 * 2**20, 0.25, 40, {1e-3: 0.01}, 1e-3)
    plan = Plan(5, 2, {CREVNET: planned, "unet": replace(planned, name="unet", width=7)})
    rows = [
        Row(MODELS, name, seed, mse, (mse - 1e-3, mse + 1e-3))
        for name, seed, mse in ((CREVNET, 0, 6e-3), ("unet", 0, 5e-3), (CREVNET, 1, 8e-3), ("unet", 1, 5.5e-3))
    ]
    stages = [Row(STAGES_TABLE, name, 0, mse, (mse, 1e-2)) for name, mse in ((FINAL, 9e-3), (STAGES[1], 8e-3))]
    rows += [*stages, Row(UNTRAINED, "zeros", 0, 1e-2, (1e-2, 1e-2))]
    lines = page("cities", rows, plan).splitlines()
    unet, crevnet = (line for line in lines if line.startswith(("| U-Net", "| CrevNet |  |")))
    assert crevnet == (
        "| CrevNet |  | 1,234 | 3.0 | 0.25 | 80 | 0.001 | 7.000e-3 ± 1.000e-3 | 6.000e-3 ± 1.000e-3 | 8.000e-3 ± 1.000e-3 |"
    )
    assert unet.startswith("| U-Net | 7 |") and "| 5.250e-3 ± 0.250e-3 |" in unet
    assert (
        f"| CrevNet | {STAGES[1]} | {FINAL} |" in lines and "| MSE | 8.000e-3 | 9.000e-3 |" in lines
    )  # as in the paper
    assert "| +10 min | 10.000e-3 | 10.000e-3 |" in lines
    assert "| zeros | 10.000e-3 | 10.000e-3 | 10.000e-3 |" in lines and any("2 seeds; each model" in li for li in lines)


def test_wrong_use_is_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")
    monkeypatch.setattr("sys.argv", ["experiment.py", "cities", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        experiment.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said and str(tmp_path / "data") in said


def test_scores_are_kept_whole(done):
    kept = json.loads((done[0] / "seed-0" / "scores.json").read_text())
    assert [row["name"] for row in kept] == [row.name for row in done[1]]
