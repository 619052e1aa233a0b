"""The model that CONTRIBUTING.md adds: one file and one name."""

import re
import sys
from pathlib import Path
from typing import Literal, get_args

import baseline_nets
import pytest
import test_baselines

from crevnet.networks import baselines, config, models
from crevnet.networks.baselines.recurrent import StackedConfig
from crevnet.training.settings import load_settings

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"
NAME = "convgru"
CONTRACT = [
    test_baselines.test_gradients_reach_every_parameter,
    test_baselines.test_loss_is_the_mean_over_all_predictions,
    test_baselines.test_generated_frames_are_predicted_from_generated_frames,
]


@pytest.fixture(autouse=True)
def example(tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").partition("## Add a model")[2].partition("\n## ")[0]
    (tmp_path / f"{NAME}.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    names = Literal[(*get_args(config.ModelName), NAME)]
    for module in ("crevnet.networks.config", "crevnet.training.settings", "crevnet.cli.starting"):
        monkeypatch.setattr(f"{module}.ModelName", names)
    monkeypatch.setitem(models.MODELS, NAME, models.model_named(NAME))
    monkeypatch.setitem(baseline_nets.TINY, NAME, baseline_nets.LAYERS)
    yield
    sys.modules.pop(f"crevnet.networks.baselines.{NAME}", None)


@pytest.mark.parametrize("task", [baseline_nets.TASK, baseline_nets.MAPPED], ids=["plain", "mapped"])
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_it_keeps_the_baselines_contract(test, task):
    test(NAME, task)


def test_training_lowers_its_loss():
    test_baselines.test_training_lowers_the_loss(NAME)


def test_it_is_trained_and_scored(crevnet, cities, tmp_path):
    small = ("--model.hidden=3", "--model.layers=2", "--model.kernel=3", "--model.past=3", "--model.horizon=2")
    once = (
        "--training.epochs=1",
        "--training.batches=1",
        "--training.validation_batches=1",
        "--training.accelerator=cpu",
    )
    run = tmp_path / "run"
    crevnet("fit", "--model", NAME, *small, *once, "--data.root", cities, "--out", run)
    model = load_settings(run).model
    assert isinstance(model, StackedConfig) and model.name == NAME and model.hidden == 3
    assert "ConvGRU" in crevnet("evaluate", run)
    assert NAME in crevnet("fit", "--help")
