"""The README and docs/ agree with the code: their Python runs and prints the text below it, the programs understand the
command lines, and the files and options named exist.

docs/coming-from.md is run by test_coming_from.py, section by section.
"""

import inspect
import pkgutil
import re
import runpy
import shlex
import shutil
from argparse import ArgumentParser
from contextlib import redirect_stdout
from io import StringIO
from itertools import groupby
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import crevnet.commands
import crevnet.competition.commands
import revflow
from crevnet.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {
    page.name: page.read_text(encoding="utf-8")
    for page in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
pages = pytest.mark.parametrize("page", PAGES)
EXAMPLES = [name for name, text in PAGES.items() if "```python" in text and name != "coming-from.md"]

# Times, shares of times and rounding errors, and which of many such errors is the largest: others on each machine.
OF_THE_MACHINE = re.compile(
    r"\d+\.\d%|\d\.\de[-+]\d\d|(?<=time)\s+\d+\.\d\d|(?:against standard autograd|of the largest stream) \(.*?\)(?=\n)"
)


@pytest.mark.parametrize("page", EXAMPLES)
def test_python_runs_and_prints_what_stands_below_it(page, capsys, monkeypatch, tmp_path):
    """The blocks of a page run in one namespace, and in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    names, everything = {}, ""
    for source, expected in re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", PAGES[page], re.DOTALL):
        exec(source, names)
        printed = capsys.readouterr().out
        if expected:
            found, wanted = (OF_THE_MACHINE.sub("#", text).split() for text in (printed, expected))
            assert found == wanted  # pages break long lines
        everything += printed
    if page == "README.md":
        reversible, plain = map(float, re.findall(r"([\d.]+) MiB", everything))
        assert reversible < plain / 10


def command_lines(text):
    """Those of the bash blocks, as lists of words; a conditional's parts one by one."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=";")
            words.whitespace_split = True
            for is_end, part in groupby(words, ";".__eq__):
                command = [word for word in part if word not in ("then", "else", "fi", "...")]
                if command and not is_end and command[0] != "if":
                    yield command


@pytest.fixture
def understood(monkeypatch, tmp_path):
    """Whether what a command line calls understands it. Nothing is done but to parse it."""
    done = []
    for module in (crevnet.commands, crevnet.competition.commands):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                monkeypatch.setattr(module, name, lambda *_, **__: done.append(True))

    def parse_and_stop(self, *arguments):
        parse(self, *arguments)
        done.append(True)
        raise StopIteration

    parse = ArgumentParser.parse_args
    # The files that are named; RUN is a run.
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("RUN").mkdir()
    for file in ("settings.yaml", "RUN/config.yaml"):
        shutil.copy(ROOT / "configs" / "demo.yaml", file)
    Path("validation.txt").write_text("2019-06-01\n")

    def check(words):
        program, *arguments = words
        if program == "crevnet":
            main(arguments)
            assert done.pop()
        elif program == "torchrun":
            launched = get_args_parser().parse_args(arguments)
            if launched.module:
                assert launched.training_script == "crevnet.cli"
                check(["crevnet", *launched.training_script_args])
        elif program == "python":
            script = arguments.pop(0)
            monkeypatch.setattr("sys.argv", [script, *arguments])
            with monkeypatch.context() as patch, pytest.raises(StopIteration):
                patch.setattr(ArgumentParser, "parse_args", parse_and_stop)
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert done.pop()
        elif program == "make":
            assert (
                arguments[0] in re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
            )
        elif program == "pip":
            extras = re.findall(r"\w+", " ".join(re.findall(r"\[(.*?)\]", " ".join(arguments))))
            assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
        else:
            assert program == "tensorboard"

    return check


@pages
def test_command_lines_are_understood(page, understood):
    spans = re.findall(r"`((?:python (?:bench|examples)/\w+\.py|make |pip |torchrun )[^`]*)`", PAGES[page])
    for words in [*command_lines(PAGES[page]), *map(shlex.split, spans)]:
        understood(words)


COMMANDS = ["fit", "recipe paper", "evaluate", "predict", "figures", "submit", "score", "show"]
COMMANDS += ["data synth", "data moving-mnist", "data repack", "data holdout"]


def test_every_command_has_a_reference():
    assert sorted(re.findall(r"<!-- help: (.*?) -->", PAGES["cli.md"])) == sorted(COMMANDS)
    help_of = runpy.run_path(str(ROOT / "docs" / "outside.py"))["_help"]
    assert "--checkpoint" in help_of("evaluate")


@pytest.fixture(scope="module")
def options():
    """Those of all of crevnet's commands, as their help has them."""
    found = set()
    for command in COMMANDS:
        text = StringIO()
        with redirect_stdout(text), pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        found |= set(re.findall(r"--[\w.-]+\w", text.getvalue()))
    return found


@pages
def test_named_options_exist(page, options):
    spans = re.findall(r"`((?:crevnet |--)[^`]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    assert {option for span in spans for option in re.findall(r"--[\w.-]+\w", span)} <= options


@pages
def test_named_files_exist(page):
    folder = ROOT if (ROOT / page).is_file() else ROOT / "docs"
    names = [ROOT / name for name in re.findall(r"`((?:tests|bench|docs|revflow|configs)/[\w./-]+)`", PAGES[page])]
    names += [folder / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])]
    for name in names:
        assert name.exists(), name


def test_what_depends_on_publication_waits_for_it():
    """No badge, install line or URL of a repository before pyproject.toml names it. Then, the README has them."""
    published = bool(runpy.run_path(str(ROOT / "docs" / "outside.py"))["PUBLICATION"]["repository"])
    readme = re.sub(r"<!--.*?-->", "", PAGES["README.md"])
    assert ("pip install revflow\n" in readme) == published
    assert bool(re.search(r"!\[[^]]*\]\(https?:", readme)) == published  # badges


def test_the_api_is_documented_in_full():
    modules = {module.name for module in pkgutil.iter_modules(revflow.__path__)} - {
        "verify"
    }  # the function of this name
    public = {name for name in vars(revflow) if not name.startswith("_")} - modules
    assert public == set(re.findall(r"^::: revflow\.(?:\w+\.)?(\w+)$", PAGES["api.md"], re.MULTILINE))
