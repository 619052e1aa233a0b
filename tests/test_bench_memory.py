"""bench/memory.py: its rows against the states that a step has to keep, and predicted bytes against those of real steps."""

import json
import sys

import pytest

import memory
from crevnet import PRESETS, CrevNet

HEIGHT, WIDTH = 24, 20


@pytest.fixture
def rows(monkeypatch, tmp_path, capsys):
    def call(*options):
        out = tmp_path / "rows.json"
        size = ["--preset", "tiny", "--height", str(HEIGHT), "--width", str(WIDTH)]
        monkeypatch.setattr(sys, "argv", ["memory.py", *size, *options, "--json", str(out)])
        memory.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return call


def states(batch):
    """Bytes of h, c and m of all modules."""
    config = PRESETS["tiny"]
    stream = batch * config.widths[-1] * (HEIGHT // config.downsampling) * (WIDTH // config.downsampling) * 4
    return 3 * config.modules * stream


def test_a_time_step_keeps_little_more_than_the_states(rows):
    """A latent (1 V), a predicted frame and the states: h, c and m of every module."""
    found, _ = rows("--steps", "3", "7", "--schedule", "plain", "reversible", "--how", "predicted")
    plain, reversible = ([r for r in found if r["schedule"] == s] for s in ("plain", "reversible"))
    kept = [(pair[1]["activations"] - pair[0]["activations"]) / 4 for pair in (plain, reversible)]
    assert kept[1] < kept[0] / 5
    frame = 4 * HEIGHT * WIDTH * 4
    guard = kept[1] - states(1) - 2 * frame
    assert 0 <= guard < 2 * 8 * 1024


@pytest.mark.parametrize(
    "schedule",
    ["plain", "checkpoint", "reversible", "reversible-bfloat16", "reversible-offloaded", "reversible-every-3"],
)
def test_predicted_bytes_are_those_of_a_real_step(rows, schedule):
    options = ("--steps", "3", "--batch", "2", "--schedule", schedule)
    (predicted,), _ = rows(*options, "--how", "predicted")
    (tracked,), _ = rows(*options, "--how", "tracked")
    assert predicted | {"how": ""} == tracked | {"how": ""}


def test_a_row_and_what_is_printed(rows):
    (row,), text = rows("--steps", "2", "--schedule", "reversible", "--how", "tracked")
    count = sum(p.numel() for p in CrevNet(PRESETS["tiny"]).parameters())
    assert row["parameters"] == row["gradients"] == row["optimizer"] // 2 == 4 * count
    assert row["peak"] >= row["parameters"] * 4 + row["activations"]
    names = ("model", "preset", "schedule", "patch", "batch", "steps", "height", "width", "how")
    assert [row[n] for n in names] == ["crevnet", "tiny", "reversible", 1, 1, 2, HEIGHT, WIDTH, "tracked"]
    assert "tracked" in text and "reversible" in text


@pytest.mark.parametrize(
    "options", [["--steps", "0"], ["--preset", "huge"], ["--batch", "many"], ["--schedule", "none"]]
)
def test_wrong_options_end_in_a_line(rows, options, capsys):
    with pytest.raises(SystemExit) as error:
        rows(*options)
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
