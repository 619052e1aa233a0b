"""bench/regressions.py on hand-made files, and bench/test_hot_paths.py: every path with the engine and without."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import regressions
import test_hot_paths
from regressions import Ratio

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run_file(tmp_path):
    """Writes what pytest-benchmark does, as far as it is read: the ratios of the rounds by hot path."""

    def write(name="run.json", **rounds):
        path = tmp_path / name
        cases = [{"group": group, "extra_info": {"ratios": ratios}} for group, ratios in rounds.items()]
        path.write_text(json.dumps({"benchmarks": cases}))
        return path

    return write


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Exit status, output and errors; what is stored is tmp_path / "stored.json"."""

    def run(*arguments):
        everything = ["regressions.py", *map(str, arguments), "--stored", str(tmp_path / "stored.json")]
        monkeypatch.setattr(sys, "argv", everything)
        try:
            regressions.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def stored(call, run_file):
    """Two paths are stored, at ratios of 2 and 3."""
    assert call(run_file("stored-run.json", additive=[2.0], gated=[3.0]), "--store")[0] == 0


def lines(out, path):
    return [line for line in out.splitlines() if path in line]


def test_a_run_counts_by_its_median_and_runs_by_theirs(run_file):
    runs = [
        run_file("1.json", a=[9.0, 1.0, 2.0], b=[5.0]),  # 2
        run_file("2.json", a=[4.0, 4.0, 100.0]),  # 4
        run_file("3.json", a=[3.0, 3.5, 0.1, 2.5]),  # 2.75
    ]
    assert regressions.ratios(runs) == {"a": Ratio(2.75, 2.0, 4.0), "b": Ratio(5.0, 5.0, 5.0)}


def test_what_is_stored_is_read_again_with_date_and_machine(call, run_file, tmp_path):
    code, out, _ = call(run_file("1.json", a=[1.0]), run_file("2.json", a=[2.0]), "--store")
    assert code == 0 and "1 hot paths" in out and len(out.splitlines()) == 1
    about, found = regressions.load(tmp_path / "stored.json")
    assert found == {"a": Ratio(1.5, 1.0, 2.0)}
    assert str(date.today()) in about and torch.__version__ in about


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("additive", "code", "word"), [(2.0, 0, ""), (2.19, 0, ""), (2.21, 1, "SLOWER"), (1.81, 0, ""), (1.79, 0, "faster")]
)
def test_more_than_the_margin_fails(call, run_file, additive, code, word):
    found, out, _ = call(run_file(additive=[additive], gated=[3.0]))
    assert bool(found) == bool(code)
    (line,) = lines(out, "additive")
    assert "2.000" in line and f"{additive:.3f}" in line and f"{additive / 2 - 1:+.1%}" in line
    assert line.strip(" │").endswith(word or "%")
    (other,) = lines(out, "gated")
    assert "+0.0%" in other
    if code:
        assert found == "failed: additive"


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("margin", "fails"), [(19, True), (21, False)])
def test_the_margin_is_an_option(call, run_file, margin, fails):
    code, out, _ = call(run_file(additive=[2.4], gated=[3.0]), "--margin", margin)
    assert bool(code) == fails and f"margin: {margin} %" in out


@pytest.mark.usefixtures("stored")
def test_a_path_that_was_not_run_fails(call, run_file):
    code, out, _ = call(run_file(additive=[2.0]))
    assert code == "failed: gated" and "NOT RUN" in lines(out, "gated")[0]


@pytest.mark.usefixtures("stored")
def test_a_new_path_does_not_fail(call, run_file):
    code, out, _ = call(run_file(additive=[2.0], gated=[3.0], exact=[9.0]))
    assert code == 0 and "not stored yet" in lines(out, "exact")[0]


@pytest.mark.usefixtures("stored")
def test_comparing_stores_nothing(call, run_file, tmp_path):
    before = (tmp_path / "stored.json").read_bytes()
    call(run_file(additive=[9.0], new=[1.0]))
    assert (tmp_path / "stored.json").read_bytes() == before


BROKEN = ["", "[]", "{}", "3", '{"benchmarks": []}', '{"benchmarks": [{}]}']
BROKEN_RATIOS = ["null", "[]", '["x"]', "[0]", "[NaN]", "[Infinity]"]


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    "content",
    [*BROKEN, *(f'{{"benchmarks": [{{"group": "a", "extra_info": {{"ratios": {r}}}}}]}}' for r in BROKEN_RATIOS)],
)
def test_a_broken_run_ends_in_a_line(call, tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    code, _, err = call(path)
    assert code == 2 and str(path) in err.splitlines()[-1]


@pytest.mark.parametrize(
    "content", [*BROKEN, '{"date": "", "machine": "", "ratios": {"a": 1}}', '{"date": "", "ratios": {}}']
)
def test_a_broken_store_ends_in_a_line(call, run_file, tmp_path, content):
    path = tmp_path / "stored.json"
    path.write_text(content)
    code, _, err = call(run_file(a=[1.0]))
    assert code == 2 and str(path) in err.splitlines()[-1]


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", '"x"', "null"])
def test_a_stored_ratio_that_is_none_ends_in_a_line(call, run_file, tmp_path, value):
    path = tmp_path / "stored.json"
    ratio = f'{{"median": {value}, "lowest": 1, "highest": 1}}'
    path.write_text(f'{{"date": "", "machine": "", "ratios": {{"a": {ratio}}}}}')
    code, _, err = call(run_file(a=[1.0]))
    assert code == 2 and str(path) in err.splitlines()[-1]


def test_missing_files_end_in_a_line(call, run_file, tmp_path):
    for run, missing in [(tmp_path / "no.json", "no.json cannot be read"), (run_file(a=[1.0]), "with --store")]:
        code, _, err = call(run)
        assert code == 2 and missing in err.splitlines()[-1]


def test_a_store_that_cannot_be_written_ends_in_a_line(call, run_file, tmp_path):
    (tmp_path / "stored.json").mkdir()
    code, _, err = call(run_file(a=[1.0]), "--store")
    assert code == 2 and "stored.json" in err.splitlines()[-1]


@pytest.mark.parametrize("name", test_hot_paths.HOT_PATHS)
def test_a_hot_path_goes_through_the_engine_and_without(name):
    """The engine evaluates every conditioner twice in training, and a recurrent cell's mix three times."""
    path = test_hot_paths.HOT_PATHS[name]()
    engine, plain = evaluations(path.engine), evaluations(path.plain)
    assert plain > 0
    if name == "recurrence":
        assert 2 * plain < engine < 3 * plain
    else:
        assert engine == (plain if name == "inverse" else 2 * plain)


def evaluations(work):
    """How often linear maps and convolutions run."""
    count = 0

    def hook(module, *_):
        nonlocal count
        count += isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        work()
    finally:
        handle.remove()
    return count


def test_what_pytest_benchmark_writes_is_read(tmp_path):
    out = tmp_path / "run.json"
    options = ["--benchmark-enable", "--benchmark-quiet", "--benchmark-json", str(out), "-k", "inverse"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which the environment of this test may name.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_hot_paths.py", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (case,) = json.loads(out.read_text())["benchmarks"]
    times, rounds = case["stats"]["data"], case["extra_info"]["ratios"]
    assert len(times) == len(rounds) == test_hot_paths.ROUNDS and all(ratio > 0 for ratio in rounds)
    assert set(regressions.ratios([out])) == {"inverse"}


def test_a_round_is_compared_with_the_plain_one_before_it(monkeypatch):
    """The n-th plain one takes n seconds, and the engine three times as long as the one before it."""
    clock = SimpleNamespace(now=0.0, plain=0)

    def plain():
        clock.plain += 1
        clock.now += clock.plain

    def engine():
        clock.now += 3 * clock.plain

    class Benchmark:
        enabled, extra_info, stats = True, {}, SimpleNamespace(stats=SimpleNamespace(data=[]))

        def pedantic(self, target, setup, rounds, warmup_rounds):
            for number in range(warmup_rounds + rounds):
                setup()
                began = clock.now
                target()
                if number >= warmup_rounds:
                    self.stats.stats.data.append(clock.now - began)

    monkeypatch.setitem(test_hot_paths.HOT_PATHS, "fake", lambda: test_hot_paths.HotPath(engine, plain))
    monkeypatch.setattr(test_hot_paths, "time", SimpleNamespace(process_time=lambda: clock.now))
    benchmark = Benchmark()
    test_hot_paths.test_hot_path("fake", benchmark)
    assert benchmark.group == "fake" and benchmark.extra_info["ratios"] == [3.0] * test_hot_paths.ROUNDS
