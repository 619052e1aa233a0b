"""The help: one screen of the common options, all options on request, and no types of Python."""

import re
import subprocess
import sys
from typing import get_args

import pytest

import revflow
from crevnet import MODELS
from crevnet.cli.commands import COMMANDS
from crevnet.networks.config import ModelName, States


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def options(text):
    """The lines of each option and argument, joined."""
    return [" ".join(entry.split()) for entry in re.findall(r"^  \S.*(?:\n {30}.*)*", text, re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen(command, crevnet):
    lines = crevnet(*command.split(), "--help").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"Usage: crevnet {command}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_has_every_option(command, crevnet):
    short, full = (options(crevnet(*command.split(), flag)) for flag in ("--help", "--help-all"))
    names = [{entry.split()[0] for entry in entries} for entries in (short, full)]
    assert names[0] <= names[1] and len(names[1]) == len(full)
    if command == "fit":
        wanted = {"--training.strategy", "--data.validation_stride", "--model.states", "--print_config", "--data"}
        assert wanted <= names[1] and not wanted & names[0] - {"--print_config"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_types_of_python(command, crevnet):
    text = crevnet(*command.split(), "--help-all")
    for leaked in ("Optional", "Literal", "Union", "<class", "type:", "None", "null", "NoneType", "typing", "tuple["):
        assert leaked not in text


@pytest.mark.parametrize("arguments", [["fit"], ["fit", "--model", "unet"], ["submit"], ["recipe", "paper"]])
def test_descriptions_are_sentences_about_a_value(arguments, crevnet):
    text = crevnet(*arguments, "--help-all")
    for description in re.findall(r"^  \S+(?: \S+)*(?:  +|\n +)(\S.*)", text, re.MULTILINE):
        assert description[0].isupper() or description.startswith("torch"), description
        assert description.split()[0] not in {"Which", "What", "How", "Of", "Only", "Where", "Go", "Write"}, description


def test_defaults_are_those_of_the_run(run, crevnet):
    text = crevnet("fit", "--resume", run, "--help-all")
    assert "Number of epochs" in text and re.search(r"--training.batches N .*\n.*\(default: 2\)", text)
    assert "[1,2]" in text


def test_the_help_of_a_group_lists_its_commands(crevnet):
    text = crevnet("data", "--help")
    assert re.findall(r"^  (\S+)", text, re.MULTILINE) == ["synth", "moving-mnist", "repack", "holdout"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "crevnet needs a command: choose fit, evaluate, predict, figures, show, recipe, submit, score or data"),
        (["recipe"], "crevnet recipe needs a command: choose paper (see crevnet recipe --help)"),
        (["evalute"], "there is no command evalute; did you mean evaluate? (see crevnet --help)"),
        (["data", "holdot"], "there is no command data holdot; did you mean holdout? (see crevnet data --help)"),
        (["--out", "x", "fit"], "--out must follow a command: choose fit, evaluate,"),
    ],
)
def test_wrong_commands(arguments, line, failing):
    assert line in failing(*arguments)


def test_help_needs_no_pytorch():
    """Its import takes seconds."""
    code = "import sys; from crevnet.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for arguments in (
        ["--help"],
        ["fit", "--help-all"],
        ["evaluate", "--help"],
        ["submit", "--help"],
        ["show", "--help"],
    ):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


def test_the_names_of_models_are_those_of_the_table():
    assert get_args(ModelName) == tuple(MODELS)


def test_the_environment_sets_options(monkeypatch, capsys, crevnet):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("CREVNET_FIT__TRAINING__EPOCHS", "7")
    with pytest.raises(SystemExit):
        crevnet("fit", "--print_config")
    assert "epochs: 7" in capsys.readouterr().out


def test_the_choices_of_states_are_the_engines():
    assert States == revflow.States
