"""The sdist and the wheel, installed as a user does it, and used far away from the checkout: `make release`.

They are built into dist/ and stay there, so that what has been tested is what is published. It takes minutes, and the package
index.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
PACKAGES = {"revflow": ROOT / "revflow", "crevnet": ROOT / "models" / "crevnet"}
CONSTRAINTS = ROOT / "constraints.txt"
DECOY = "raise ImportError('a file of the folder that Python was started in, which nothing should import')\n"


def run(*command, cwd, status=0):
    """What a command prints, in an environment where nothing tells Python of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"CREVNET_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def environment_with(folder, *requirements):
    """The programs of a new virtual environment that has what is required."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    run(programs / "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *requirements, cwd=folder)
    return programs


@pytest.fixture(scope="session")
def distributions():
    """The files by their kinds. The wheel is built from the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, cwd=ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="session")
def source(distributions, tmp_path_factory):
    """The folder that the sdist holds."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(distributions["sdist"]) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="session")
def engine(distributions, tmp_path_factory):
    """An environment with the engine alone."""
    return environment_with(tmp_path_factory.mktemp("engine"), distributions["wheel"])


@pytest.fixture(scope="session", params=["wheel", "sdist"])
def crevnet(request, distributions, tmp_path_factory):
    """An environment with CrevNet and what it needs."""
    return environment_with(tmp_path_factory.mktemp("crevnet"), f"{distributions[request.param]}[crevnet]")


@pytest.fixture
def elsewhere(tmp_path):
    """A folder whose files have the names of the checkout's folders and of the packages' modules."""
    for folder in ("models", "models/crevnet", "bench", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(DECOY)
    for package in PACKAGES.values():
        for module in package.rglob("[a-z]*.py"):
            (tmp_path / module.name).write_text(DECOY)
    return tmp_path


def version_of(wheel):
    return wheel.name.split("-")[1]


def test_the_wheel_holds_the_two_packages_and_nothing_else(distributions):
    wheel = distributions["wheel"]
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    about = f"revflow-{version_of(wheel)}.dist-info"
    code = {f"{name}/{path.relative_to(at)}" for name, at in PACKAGES.items() for path in at.rglob("*.py")}
    files = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert found == {*code, "revflow/py.typed", *(f"{about}/{file}" for file in files)}


def test_the_sdist_holds_what_git_does(source):
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    found = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert tracked <= found
    made = {path for path in found - tracked if not path.startswith("revflow.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_the_engine_needs_torch_alone(engine, distributions, elsewhere):
    where = "import revflow; print(revflow.__version__, revflow.__file__)"
    version, file = run(engine / "python", "-c", where, cwd=elsewhere).splitlines()[-1].split()
    assert version == version_of(distributions["wheel"])
    assert Path(file).is_relative_to(engine.parent)


def test_the_readme_runs(engine, source, elsewhere):
    examples = re.findall(r"```python\n(.*?)```", (source / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (elsewhere / "readme.py").write_text("\n".join(examples))
    assert "standard autograd" in run(engine / "python", "readme.py", cwd=elsewhere)


def test_the_command_line_says_what_it_lacks(engine, elsewhere):
    *_, said = run(
        engine / "crevnet", "--help", cwd=elsewhere, status=2
    ).splitlines()  # torch warns that it has no numpy
    assert re.fullmatch(r"crevnet: \w+ is not installed, .* pip install 'revflow\[crevnet\]'", said)


def test_every_module_is_imported_from_the_package(crevnet, elsewhere):
    script = """
        import importlib, pkgutil, crevnet, revflow
        for package in (crevnet, revflow):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                if not module.name.endswith("__main__"):
                    print(importlib.import_module(module.name).__file__)
    """
    files = run(crevnet / "python", "-c", re.sub(r"^ {8}", "", script, flags=re.MULTILINE), cwd=elsewhere).split()
    assert len(files) > 50
    assert all(Path(file).is_relative_to(crevnet.parent) for file in files)


def test_the_command_line_trains(crevnet, elsewhere):
    for module in ("revflow.py", "crevnet.py"):  # a program, unlike `python -c`, does not look into the working folder
        (elsewhere / module).write_text(DECOY)
    command, tiny = crevnet / "crevnet", ("--preset", "tiny", "--training.accelerator", "cpu")
    few = ("--training.epochs", "1", "--training.batches", "2", "--training.validation_batches", "1")
    days = ("--city.training_days", "1", "--city.validation_days", "1")
    assert "recipe" in run(command, "--help", cwd=elsewhere)
    run(command, "data", "synth", "cities", "--city.height", "32", "--city.width", "32", *days, cwd=elsewhere)
    run(command, "fit", "--data.root", "cities", "--out", "run", *tiny, *few, cwd=elsewhere)
    assert "last frame" in run(command, "evaluate", "run", "--data.validation_stride", "48", cwd=elsewhere)


def test_the_engine_passes_its_tests(engine, source, tmp_path):
    """The sdist's tests, in a folder without the sources."""
    tools = ("pytest", "pytest-benchmark", "hypothesis", "numpy")
    run(engine / "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *tools, cwd=tmp_path)
    shutil.copytree(source / "tests", tmp_path / "tests")
    shutil.copy(source / "pyproject.toml", tmp_path)
    run(engine / "pytest", "tests/engine", "--maxfail", "5", "-m", "not slow", cwd=tmp_path)
