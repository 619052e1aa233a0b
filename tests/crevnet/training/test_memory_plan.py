"""CrevNet's memory budget: what a training step stores, what `fit` says of it, and runs that go on by the same plan."""

import copy
import shutil
import warnings
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from small_crevnets import SMALL, gradients, make, window
from test_resuming import assert_same_run, checkpoint, interrupt

import revflow
from crevnet import CrevNet, CrevNetConfig
from crevnet.networks.crevnet import free_share
from crevnet.training.failures import TrainingError
from crevnet.training.settings import load_settings
from crevnet.training.trainer import train

FREE = 2**34


@pytest.fixture
def free(monkeypatch):
    """The free memory, which the test may change."""
    found = [FREE]
    monkeypatch.setattr(revflow, "free_memory", lambda device: found[0])
    return found


def evaluations(model, frames, roads):
    """How often a conditioner of each block and a cell of each module is evaluated in a training step."""
    counts, hooks = {}, []
    for name, part in model.named_modules():
        if name.endswith(".conv_x") or (".blocks." in f".{name}" and isinstance(part, torch.nn.Conv2d)):
            counts[name] = 0

            def count(*_, name=name):
                counts[name] += 1

            hooks.append(part.register_forward_hook(count))
    model.loss(frames, roads).backward()
    for hook in hooks:
        hook.remove()
    return sum(counts.values())


def with_budget(budget, seed=0):
    return make(replace(SMALL, memory_budget=budget), seed)


# --- the network


@pytest.mark.parametrize("budget", ["min", "max", "auto", 0.5, "1GiB"])
def test_budgets_change_what_is_evaluated_and_no_gradient(budget):
    frames, roads = window(SMALL)
    model = with_budget(budget)
    with revflow.ordinary_autograd():
        once = evaluations(model, frames, roads)
        expected = gradients(model, lambda: model.loss(frames, roads))
    model.plan(frames, roads)
    found = gradients(model, lambda: model.loss(frames, roads))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
    again = evaluations(model, frames, roads)
    assert (again > once) == (budget == "min")


def test_the_peak_lies_within_a_budget_in_between():
    frames, roads = window(SMALL, batch=4, height=32, width=32)

    def peak(model):
        model.plan(frames, roads)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return revflow.measure_memory(lambda: model.loss(frames, roads).backward()).peak

    least, most = (peak(with_budget(budget)) for budget in ("min", "max"))
    between = (least + most) // 2
    model = with_budget(between)
    assert least < peak(model) <= between
    plan = model.budget.plan
    stored = sum(call.stored + call.outputs_stored for call in plan.calls)
    assert 0 < stored < sum(call.units for call in plan.calls) and plan.peak <= between


def test_a_plan_leaves_no_trace():
    frames, roads = window(SMALL)
    planned, other = with_budget("auto"), with_budget("auto")
    torch.manual_seed(3)
    plan = planned.plan(frames, roads)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(p.grad is None for p in planned.parameters())
    assert planned.plan(frames, roads) == plan  # the graph of the first is freed: its calls are not pending
    other.loss(frames, roads)
    assert [call.name for call in other.budget.plan.calls] == [call.name for call in plan.calls]
    assert with_budget("min").plan(frames, roads) is None


def test_auto_leaves_room_for_gradients_and_adam(free):
    config = replace(SMALL, memory_budget="auto")
    frames, roads = window(config)
    model = make(config)
    size = sum(p.numel() for p in model.parameters()) * 8
    with torch.no_grad():
        model.loss(frames, roads)
    assert model.budget.memory == "min"  # not determined yet
    model.loss(frames, roads)
    assert model.budget.memory == (FREE - 3 * size) // 2
    free[0] = 0
    model.loss(frames, roads)
    assert model.budget.memory == (FREE - 3 * size) // 2  # once for all
    share = make(replace(config, memory_budget=0.25))
    free[0] = FREE
    share.step(*(torch.cat((frames[:, 0], roads), 1),))
    assert share.budget.memory == (FREE - 3 * size) // 4
    for parameter in (model := make(config)).parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.loss(frames, roads)
    assert model.budget.memory == (FREE - 2 * size) // 2
    free[0] = size
    (model := make(config)).loss(frames, roads)
    assert model.budget.memory == "min"


def test_processes_on_one_machine_share_its_memory(free, monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(2**20))]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_share.room(parameters) == FREE // 4 - 12 * 2**20
    assert free_share.room(parameters, processes=2) == FREE // 2 - 12 * 2**20
    optimizer = torch.optim.Adam(parameters)
    parameters[0].grad = torch.zeros(2**20)
    optimizer.step()
    assert free_share.room(parameters, optimizer.state) == FREE // 4


def test_without_knowledge_of_the_free_memory_nothing_more_is_stored(monkeypatch):
    def unknown(device):
        raise RuntimeError("which cannot be determined")

    monkeypatch.setattr(revflow, "free_memory", unknown)
    frames, roads = window(SMALL)
    model = with_budget("auto")
    model.loss(frames, roads)
    assert model.budget.memory == "min"


def test_copies_share_a_budget_among_their_own_parts():
    frames, roads = window(SMALL)
    model = with_budget("1GiB")
    model.plan(frames, roads)
    other = copy.deepcopy(model)
    assert other.autoencoder.blocks.memory_budget is other.predictor.stack.memory_budget is other.budget
    assert other.budget is not model.budget and other.budget.plan is None


@pytest.mark.parametrize(("budget", "then", "recomputes"), [("auto", "max", False), ("1KiB", "min", True)])
def test_compilation_waits_for_the_plan(budget, then, recomputes):
    """If all activations fit, compiled time steps store them. Otherwise, they recompute all."""
    graphs = []
    frames, roads = window(SMALL)
    model, compiled = with_budget("max"), with_budget(budget)
    compiled.compile_parts(backend=lambda module, inputs: graphs.append(module.code) or module)
    expected = gradients(model, lambda: model.loss(frames, roads))
    for step in range(3):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is too small", UserWarning)
            found = gradients(compiled, lambda: compiled.loss(frames, roads))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-10, msg=name)
        assert bool(graphs) == (step > 0)
    torch.compiler.reset()
    assert compiled.budget.memory == then
    assert any("group_norm" in code for code in graphs) != recomputes


@pytest.mark.parametrize("value", [None, "none", "all", "12XB", -5, 1.5, True, "", []])
def test_other_budgets_are_refused(value):
    former = value is None or value in ("none", "all")
    with pytest.raises(ValueError, match='use "min"' if former else '"auto", "min", "max", a whole number of bytes'):
        CrevNetConfig(memory_budget=value)


# --- training


@pytest.fixture(scope="module")
def run_settings(settings):
    data = replace(settings.data, cities=["Here"], batch_size=3, stride=4)
    training = replace(settings.training, epochs=2, batches=None, checkpoint_minutes=1e-9, sampling_steps=6)
    model = replace(settings.model, memory_budget=_half(settings))
    return replace(settings, model=model, data=data, training=training)


def _half(settings):
    """Bytes in the middle between recomputing and storing everything, for batches of 3 windows."""
    model = CrevNet(replace(settings.model, memory_budget=2**40))
    frames, roads = torch.rand(3, model.config.window, 3, 21, 14), torch.rand(3, 1, 21, 14)
    most = model.plan(frames, roads).peak
    model.use_budget(revflow.Budget(1))
    with pytest.warns(UserWarning, match="too small"):
        least = model.plan(frames, roads).peak
    return (least + most) // 2


def test_a_resumed_run_follows_the_same_plan(run_settings, tmp_path, monkeypatch):
    """From its first step on. The last batch of an epoch is smaller. The second step is the first that feeds predictions."""
    lines = []
    train(run_settings, tmp_path / "whole", report=lines.append)
    assert len(lines) == 1 and lines[0].startswith(f"memory budget {run_settings.model.memory_budget}: ")
    assert checkpoint(tmp_path / "whole")["global_step"] == 2 * 3
    in_optimizer = torch, "_fused_adam_"  # after the forward pass of the next step, which is not in the checkpoint
    for number, (call, (owner, name)) in enumerate([(2, in_optimizer), (3, (CrevNet, "loss"))]):
        with monkeypatch.context() as patch:
            interrupt(patch, name, call, owner)
            with pytest.raises(TrainingError):
                train(run_settings, tmp_path / "parts", resume=number > 0)
    train(run_settings, tmp_path / "parts", resume=True, report=lines.append)
    assert lines[1] == lines[0]
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    recomputed = replace(run_settings, model=replace(run_settings.model, memory_budget="min"))
    train(recomputed, tmp_path / "min")
    with pytest.raises(AssertionError):  # so the plan matters to the last bit
        assert_same_run(tmp_path / "min", tmp_path / "whole")


@pytest.mark.parametrize("left", [1, 2**-8])
def test_a_plan_that_no_longer_fits_is_made_anew(left, settings, free, tmp_path, monkeypatch):
    settings = replace(settings, training=replace(settings.training, checkpoint_minutes=1e-9))
    with monkeypatch.context() as patch:
        interrupt(patch, "loss", 2)
        with pytest.raises(TrainingError):
            train(settings, tmp_path)
    before = checkpoint(tmp_path)["memory"]
    free[0] = int(left * (FREE - 2**24))  # Adam's state exists now
    lines = []
    train(settings, tmp_path, resume=True, report=lines.append)
    after = checkpoint(tmp_path)["memory"]
    if left == 1:
        assert after["amount"] == before["amount"] and len(lines) == 1
    else:
        assert after["amount"] < before["amount"] and len(lines) == 2
        assert lines[0].startswith(
            "the memory budget of the checkpoint is 8.00 GiB, but only 0.06 GiB are free: a new plan"
        )


def test_runs_of_earlier_versions(settings, run, tmp_path, crevnet):
    """Their config.yaml has no memory_budget, and their checkpoints have no plan."""
    old = shutil.copytree(run, tmp_path / "old")
    values = yaml.safe_load((old / "config.yaml").read_text())
    assert values["model"].pop("memory_budget") == "auto"
    (old / "config.yaml").write_text(yaml.safe_dump(values))
    last = checkpoint(old)
    del last["memory"]
    torch.save(last, old / "checkpoints" / "last.ckpt")
    assert load_settings(old).model == settings.model
    assert "memory budget auto: " in crevnet("fit", "--resume", old, "--training.epochs", "2")


def test_another_budget_is_no_other_architecture(settings, run, tmp_path, crevnet):
    assert "memory budget min: all activations are recomputed" in crevnet(
        "fit",
        "--config",
        run / "config.yaml",
        "--training.start",
        run,
        "--model.memory_budget",
        "min",
        "--out",
        tmp_path / "a",
    )
    text = crevnet("fit", "--resume", tmp_path / "a", "--model.memory_budget", "max", "--training.epochs", "2")
    assert "memory budget max: all activations are stored" in text
    crevnet("evaluate", run, tmp_path / "a")
    assert asdict(load_settings(tmp_path / "a"))["model"]["memory_budget"] == "max"


@pytest.mark.parametrize("value", ["none", "nothing", "2XB"])
def test_the_command_line_refuses_other_budgets(value, failing):
    assert "memory_budget" in (line := failing("fit", f"--model.memory_budget={value}")) and '"min"' in line
