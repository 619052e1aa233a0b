"""bench/gpu.py: all of its stages at toy size, without what a GPU machine may lack; and what becomes of stages that go wrong."""

import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import capacity
import gpu
import memory
from crevnet.training.failures import TrainingError
from gpu_stages import cuda_tests
from gpu_stages import loading as loading_stage
from gpu_stages import memory as memory_stage
from gpu_stages import training as training_stage
from gpu_stages.stage import STAGES, Setup, Stage
from kit import device_memory, rates
from kit.memory_row import Row
from kit.schedules import Training

ROOT = Path(__file__).parent.parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HIDDEN = ("rich", "jsonargparse", "hdf5plugin")
HIDE = f"""
import importlib.metadata, sys
for name in {HIDDEN}:
    sys.modules[name] = None
found = importlib.metadata.distribution
def distribution(name):
    if name in {HIDDEN}:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
importlib.metadata.version = lambda name: distribution(name).version
"""


def test_every_stage_at_toy_size_without_packages_that_may_be_missing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "models")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in HIDDEN:
        imported = subprocess.run([sys.executable, "-c", f"import {name}"], env=environment, capture_output=True)
        assert b"ModuleNotFoundError" in imported.stderr
    out = tmp_path / "out"
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", "--toy", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = {stage.name: json.loads((out / f"{stage.name}.json").read_text()) for stage in STAGES}
    assert {name: (f["status"], f["error"]) for name, f in found.items()} == dict.fromkeys(found, ("ok", ""))
    assert run.returncode == 0, run.stdout + run.stderr
    for name, stage in found.items():
        assert stage["stage"] == name and stage["rows"] and stage["seconds"] > 0
        assert not any(row.get("note", "").startswith("not predicted") for row in stage["rows"])
        page = (out / f"{name}.md").read_text()
        assert re.search(r"torch 2\.\d+", page) and re.search(r"20\d\d-\d\d-\d\d", page) and "| :--" in page
        assert "python bench/gpu.py --device cpu --toy" in page
    assert [row["status"] for row in json.loads((out / "summary.json").read_text())["stages"]] == ["ok"] * len(STAGES)
    check_rows({name: stage["rows"] for name, stage in found.items()})


def check_rows(rows):
    """What of a toy run's rows is no time."""
    crevnet = [row for row in rows["memory"] if row["model"] == "crevnet"]
    assert all(row["predicted_bytes"] == row["requested_bytes"] for row in crevnet)
    assert all(row["workspace_bytes"] == row["operators_bytes"] == 0 for row in crevnet)  # no more than tensors
    assert {row["model"] for row in rows["memory"]} == set(memory.MODELS)
    batches = {row["schedule"]: row["batch"] for row in rows["capacity"]}
    assert 0 < batches["plain"] < batches["reversible"]
    exact = [row for row in rows["correctness"] if "equal" in row]
    assert len(exact) == 24 and all(row["equal"] and row["standard_repeats"] for row in exact)
    (tests,) = (row for row in rows["correctness"] if row.get("tests"))
    assert tests["passed"] + tests["skipped"] == 1 and tests["failed"] == 0
    by_network = Counter(row["network"] for row in rows["tradeoff"] if not row["setting"].startswith("as "))
    assert len(by_network) == 3 and len(set(by_network.values())) == 1
    first, resumed, in_bfloat16 = rows["training"]
    assert (first["first_step"], resumed["first_step"], in_bfloat16["first_step"]) == (0, first["steps"], 0)
    assert (first["run"], resumed["run"], in_bfloat16["run"]) == ("16-mixed", "16-mixed, resumed", "bf16-mixed")
    assert {row["consumption_from"] for row in rows["loading"]} == {"stage training"}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The folder, and the outcomes by the stages' names."""
    out = tmp_path_factory.mktemp("faults")
    names = ["stays", "raises", "runs_out", "finds_no_engine", "dies", "skips", "leaves_nothing", "job_fails", "works"]
    stages = [Stage(name, f"Stage {name}", 600, f"bench.gpu_faults:{name}") for name in names]
    stages[0] = replace(stages[0], limit=15)
    stages.insert(-1, Stage("is_missing", "A module that is missing", 600, "no_such_module:rows"))
    minutes = sum(stage.limit for stage in stages) / 60
    return out, {outcome.stage: outcome for outcome in gpu.run_all(stages, out, minutes, "cpu", toy=True)}


@pytest.mark.parametrize(
    ("name", "status", "rows", "error"),
    [
        ("stays", "out of time", 2, "stopped at its limit of 15 s"),
        ("raises", "failed", 1, "ValueError: planted"),
        ("runs_out", "out of memory", 1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("finds_no_engine", "out of memory", 1, "RuntimeError: GET was unable to find an engine"),
        ("dies", "failed", 1, "its process ended by SIGSEGV"),
        ("skips", "skipped", 0, "there is nothing to do"),
        ("leaves_nothing", "failed", 0, "it has left no rows"),
        ("job_fails", "failed", 4, "RuntimeError: 1 failed, the first: first: ValueError: planted"),
        ("is_missing", "failed", 0, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("works", "ok", 1, ""),
    ],
)
def test_a_stage_that_goes_wrong_is_a_row_and_the_next_one_starts(faults, name, status, rows, error):
    out, _ = faults
    found = json.loads((out / f"{name}.json").read_text())
    assert (found["status"], len(found["rows"])) == (status, rows)
    assert found["error"].startswith(error) and bool(found["error"]) == bool(error) and "\n" not in found["error"]
    page = (out / f"{name}.md").read_text()
    assert f"Status: {status}, " in page and error in page
    (row,) = (row for row in json.loads((out / "summary.json").read_text())["stages"] if row["stage"] == name)
    assert (row["status"], row["rows"], row["error"]) == (status, rows, found["error"])


def test_the_children_of_a_stage_are_stopped_with_it(faults):
    out, _ = faults
    process = Path("/proc") / (out / "child").read_text() / "stat"
    for _ in range(100):
        if not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"{process} is still there")


def test_what_is_kept_of_a_failure(faults):
    _, outcomes = faults
    assert outcomes["raises"].traceback[-2:] == ["ValueError: planted", "on two lines"]
    assert "last words" in outcomes["dies"].log and any("Segmentation" in line for line in outcomes["dies"].log)
    notes = [row["note"] for row in outcomes["job_fails"].rows]
    assert notes == ["ValueError: planted", "out of memory", "ValueError: planted", ""]


def test_values_on_pages(faults):
    out, _ = faults
    assert "| a \\| b | 1.0 |  | yes |  |" in (out / "works.md").read_text()
    assert json.loads((out / "works.json").read_text())["rows"][0]["share"] is None


@pytest.mark.parametrize(("names", "status"), [(["works", "skips"], 0), (["works", "raises"], 1), (["stays"], 1)])
def test_exit_status(monkeypatch, tmp_path, faults, names, status):
    _, outcomes = faults
    monkeypatch.setattr(gpu, "run_all", lambda *_: [outcomes[name] for name in names])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == status


def test_a_stage_without_time_is_out_of_time(tmp_path):
    (outcome,) = gpu.run_all([Stage("works", "", 1, "bench.gpu_faults:works")], tmp_path, -1.0, "cpu", toy=True)
    assert (outcome.status, outcome.error) == ("out of time", "no time was left")


def test_limits_of_the_stages_are_nine_minutes_together():
    assert sum(stage.limit for stage in STAGES) == 9 * 60


@pytest.mark.parametrize(
    "options",
    [["--stages", "none"], ["--minutes", "0"], ["--device", "tpu"], ["--device", "cpu"], ["--out", "/dev/null/x"], []],
)
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(options) and options[0] != "--device")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as error:
        gpu.main()
    usage, *lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and usage.startswith("usage:") and len(lines) == 1
    assert (options or ["--device cpu --toy"])[0] in lines[0]


# What only a GPU does, with stand-ins


def test_a_cap_names_the_device_s_number(monkeypatch):
    """PyTorch refuses `torch.device("cuda")` there."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**37))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    for device in ("cuda", "cuda:1"):
        device_memory.cap(torch.device(device), 2**34)
    device_memory.cap(CUDA, 2**40)
    assert fractions == [(0.125, 3), (0.125, 1), (1.0, 3)]


def test_checkpointed_networks_are_freed_before_a_measurement(monkeypatch):
    """They are cycles."""
    parameters, make = [], Training.network

    def made(training):
        network = make(training)
        parameters.append(weakref.ref(next(network.parameters())))
        return network

    monkeypatch.setattr(Training, "network", made)
    gc.disable()
    try:
        steps = Training("tiny", "checkpoint", "32-true", 1, 1, 32, 32, CPU, model="unet").train()
        next(steps)
        del steps
        device_memory.free()
        assert parameters.pop()() is None
    finally:
        gc.enable()


def test_a_second_step_that_runs_out_of_memory_lowers_the_batch(monkeypatch):
    def pace(training, rounds):
        if training.batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7.0

    monkeypatch.setattr(rates, "sequences_per_second", pace)
    training = Training("tiny", "plain", "32-true", 5, 2, 24, 20, CPU)
    row = capacity.Row("crevnet", "tiny", "plain", "32-true", 1, 2, 24, 20, 16, "cuda", 5, 10**9)
    found = capacity.trained(row, training, 2)
    assert (found.batch, found.sequences_a_second) == (3, 7.0)
    assert found.peak == memory.tracked(replace(training, batch=3)).peak
    monkeypatch.setattr(rates, "sequences_per_second", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capacity.trained(row, training, 2)


def test_the_parts_of_the_difference_add_up(monkeypatch):
    training = Training("tiny", "plain", "32-true", 1, 2, 24, 20, CUDA)
    names = ("crevnet", "tiny", "plain", "32-true", 1, 6, 1, 2, 24, 20)
    measured = Row(*names, "cuda", 1, peak=130, allocated=140, reserved=200, first=150)
    monkeypatch.setattr(memory, "on_cuda", lambda _: measured)
    monkeypatch.setattr(memory_stage, "live_tensors", lambda *_: 110)
    prediction = Future()
    prediction.set_result([Row(*names, "predicted", 1, peak=100)])
    row = memory_stage.compared(training, prediction)
    parts = {name: row[f"{name}_bytes"] for name in ("operators", "workspace", "rounding", "cached")}
    assert parts == {"operators": 10, "workspace": 20, "rounding": 10, "cached": 60}
    assert row["predicted_bytes"] + sum(parts.values()) == row["reserved_bytes"] == 200
    assert row["difference_bytes"] == 30 and row["first_step_bytes"] == 150
    monkeypatch.setattr(memory, "on_cuda", lambda _: replace(measured, peak=None, note="out of memory"))
    failed = Future()
    failed.set_exception(ValueError("planted"))
    row = memory_stage.compared(replace(training, model="vpn"), failed)
    assert row["requested_bytes"] is row["difference_bytes"] is None
    assert row["note"] == "out of memory; not predicted: planted"


def test_what_the_allocator_counts_is_that_of_the_second_step(monkeypatch):
    counts = {"memory_allocated": 5, "memory_reserved": 7, "max_memory_allocated": 105, "max_memory_reserved": 207}
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, count=count: count)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    reports = {1: SimpleNamespace(peak=90, kept=40), 2: SimpleNamespace(peak=55, kept=0)}
    forward = SimpleNamespace(peak=30, kept=20)
    outer, inside = [], []

    def measure(step, device):
        if inside:
            step()
            return forward
        outer.append(step)
        inside.append(True)
        step()
        inside.clear()
        return reports[len(outer)]

    monkeypatch.setattr(memory.revflow, "measure_memory", measure)
    found = memory.on_cuda(Training("tiny", "plain", "32-true", 1, 1, 24, 20, CPU))
    assert (found.peak, found.first, found.allocated, found.reserved) == (40 + 55, 90, 100, 200)
    assert found.activations == 20


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """One with tests for CUDA that pass, fail and, if told so, take long."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["cuda: x"]\naddopts = "--no-such"\n'
    )
    monkeypatch.setattr(cuda_tests, "ROOT", tmp_path)

    def call(body, left=60.0):
        (tmp_path / "tests" / "test_some.py").write_text(
            "import pytest, time\npytestmark = pytest.mark.cuda\ndef test_passes(): pass\n" + body
        )
        assert [*cuda_tests.marked()] == [Path("tests/test_some.py")]
        return cuda_tests.rows(Setup("cuda", False, tmp_path, tmp_path, time.monotonic() + left))

    return call


def test_failures_among_the_tests_for_cuda_are_rows(checkout):
    found = checkout("def test_fails():\n    assert 1 == 2\n")
    assert next(found) == {"tests": "tests/test_some.py", "passed": 1, "failed": 1, "skipped": 0}
    row = next(found)
    assert row["failed_test"] == "tests/test_some.py::test_fails" and "assert 1 == 2" in row["note"]
    with pytest.raises(AssertionError, match=r"pytest ended with exit status 1: .* 1 failed, 1 passed"):
        next(found)


def test_tests_for_cuda_that_take_too_long_leave_rows(checkout):
    found = checkout("def test_stays(): time.sleep(600)\n", left=10.0)
    assert next(found) == {"tests": "tests/test_some.py", "passed": 1, "failed": 0, "skipped": 0}
    assert next(found)["note"].startswith("out of time: stopped after")
    with pytest.raises(TimeoutError):
        next(found)


def test_a_batch_that_does_not_fit_is_a_row_and_a_smaller_one_is_tried(monkeypatch, tmp_path):
    def run(base, folder, seconds, resume=False):
        folder.mkdir(exist_ok=True)
        if base.data.batch_size > 8:
            raise TrainingError("out of memory: lower the batch") from torch.OutOfMemoryError("CUDA")
        return training_stage.empty(base) | {"steps": int(seconds)}

    monkeypatch.setattr(training_stage, "run", run)
    monkeypatch.setattr(training_stage, "city", lambda setup: tmp_path)
    setup = Setup("cuda", False, tmp_path, tmp_path, time.monotonic() + 60)
    base = training_stage.settings(setup)
    assert (base.training.precision, base.data.batch_size, base.model.past) == ("16-mixed", 14, 9)
    found = [*training_stage.stopped_and_resumed(base, setup, 40, 50)]
    assert [(row["batch"], row["steps"]) for row in found] == [(14, None), (11, None), (8, 40), (8, 50)]
    assert [row["note"] for row in found] == ["out of memory within 16 GiB"] * 2 + [""] * 2
    assert not [*tmp_path.glob("16-mixed-*")]  # gigabytes


def test_without_a_training_run_its_pace_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(
        loading_stage.loading, "demand", lambda step, peak: loading_stage.loading.Demand(3.0, f"batch {step.batch}")
    )
    setup = Setup("cuda", False, tmp_path, tmp_path, 0)
    rows = [{"sequences_per_second": 2.0}, {"sequences_per_second": None}, {"sequences_per_second": 5.0}]
    stored = {"device": "cuda", "toy": True, "rows": rows}
    (tmp_path / "training.json").write_text(json.dumps(stored))
    assert loading_stage.pace(setup) == (3.0, "batch 14")  # that run was of another size
    (tmp_path / "training.json").write_text(json.dumps(stored | {"toy": False}))
    assert loading_stage.pace(setup) == (5.0, "stage training")
