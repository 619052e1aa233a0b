"""The house keeps its plan: each rule's exceptions are listed by name in `exceptions.toml`, and the list only shrinks."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from house import rules

RULES = (
    rules.long_files,
    rules.long_functions,
    rules.wide_functions,
    rules.private_torch,
    rules.hidden_engine,
    rules.others_private_attributes,
    rules.foreign_imports,
)
EXCEPTIONS = tomllib.loads(Path(__file__).with_name("exceptions.toml").read_text(encoding="utf-8"))
SOURCES = rules.sources()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_only_the_exceptions_break_a_rule(rule):
    listed = EXCEPTIONS.get(rule.__name__, [])
    found = {broken for source in SOURCES for broken in rule(source)}
    assert listed == sorted(set(listed)), "the list is not sorted, or names something twice"
    new, mended = sorted(found - set(listed)), sorted(set(listed) - found)
    assert not new, f"{new} break the rule {rule.__name__}. {rule.__doc__ or ''}"
    assert not mended, f"{mended} keep the rule {rule.__name__} now: take them out of exceptions.toml"


def test_the_core_of_a_sequence_only_shrinks():
    listed, found = EXCEPTIONS["core_lines"], rules.core_lines()
    assert found <= listed, f"the core has {found} code lines. {rules.core_lines.__doc__}"
    assert found > listed - 10, f"the core has only {found} code lines now: enter that in exceptions.toml"


def test_imports_go_one_way():
    """The contracts of import-linter in pyproject.toml; an exception that is no longer needed is an error, too."""
    linted = subprocess.run(  # elsewhere, since it switches off all loggers of its process
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None))",
        ],
        cwd=rules.ROOT,
        env={**os.environ, "PYTHONPATH": f"{rules.ROOT}:{rules.ROOT / 'models'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert linted.returncode == 0, linted.stdout


def test_the_reading_order_names_each_file_of_the_engine_once():
    page = (rules.ROOT / "docs/extending.md").read_text(encoding="utf-8")
    order = page[page.index("## Source files") : page.index("## A custom coupling")]
    named = re.findall(r"`([\w/]+\.py)`", order[: order.index("Only `conditioner.py`")])
    engine = {s.name.removeprefix("revflow/") for s in SOURCES if s.is_engine}
    assert sorted(named) == sorted(name for name in engine if not name.endswith(("__init__.py", "_version.py")))
    read = set()
    for (
        name
    ) in named:  # in an order in which one meets nothing that was not read before, but for files of the same room
        imported = {module for module, _ in rules.Source(rules.ROOT / "revflow" / name).imports}
        for module in imported:
            file = module.removeprefix("revflow.").replace(".", "/") + ".py"
            if module.startswith("revflow.") and "/" not in name and "/" not in file:
                assert file in read, f"{name} imports {file}, which the reading order names later"
            if module.startswith("revflow._") and "/" in file and file.split("/")[0] != name.split("/")[0]:
                assert file in read, f"{name} imports {file}, which the reading order names later"
        read.add(name)


def test_each_room_of_the_engine_has_a_folder_of_tests():
    rooms = {path.name for path in (rules.ROOT / "revflow").glob("_*/") if (path / "__init__.py").exists()} - {"_base"}
    assert rooms <= {f"_{path.name}" for path in (rules.ROOT / "tests/engine").iterdir() if any(path.glob("test_*.py"))}
    assert not [*(rules.ROOT / "tests/engine").glob("test_*.py")]


def test_each_room_of_crevnet_has_a_folder_of_tests():
    crevnet, tests = rules.ROOT / "models/crevnet", rules.ROOT / "tests/crevnet"
    rooms = {path.parent.name for path in crevnet.glob("*/__init__.py")}
    assert rooms == {path.name for path in tests.iterdir() if any(path.glob("test_*.py"))}
    assert not [*tests.glob("test_*.py")]
    assert len([*crevnet.glob("*.py")]) <= 6
