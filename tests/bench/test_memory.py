"""bench/memory.py: predicted bytes against those of real steps, its rows against what a step has to keep, what it writes."""

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch

import memory
from crevnet import MODELS, PRESETS
from kit.memory_row import Row, beyond_model, label, lines_over
from kit.schedules import PATCHED, SCHEDULES, Training
from pages import memory_figure

CPU = torch.device("cpu")
HEIGHT, WIDTH = 24, 20
TINY = Training("tiny", "reversible", "32-true", 1, 3, HEIGHT, WIDTH, CPU)


def states(batch):
    """Bytes of h, c and m of all modules."""
    config = PRESETS["tiny"]
    stream = batch * config.widths[-1] * (HEIGHT // config.downsampling) * (WIDTH // config.downsampling) * 4
    return 3 * config.modules * stream


def test_a_time_step_keeps_little_more_than_the_states():
    """A latent (1 V), a predicted frame and the states: h, c and m of every module."""

    def a_step_keeps(schedule):
        few, many = (memory.predicted(replace(TINY, schedule=schedule, steps=n), [1])[0].activations for n in (3, 7))
        return (many - few) / 4

    plain, of_autoencoder, reversible = map(a_step_keeps, ("plain", "reversible-autoencoder", "reversible"))
    assert reversible < plain / 5 and reversible < of_autoencoder < plain
    frame = 4 * HEIGHT * WIDTH * 4
    guard = reversible - states(1) - 2 * frame
    assert 0 <= guard < 2 * 8 * 1024


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_predicted_bytes_are_those_of_a_real_step(schedule):
    compare(replace(TINY, schedule=schedule))


@pytest.mark.parametrize("schedule", ["plain", "checkpoint"])
@pytest.mark.parametrize("model", [m for m in MODELS if m != "crevnet"])
def test_predicted_bytes_of_a_baseline_are_those_of_a_real_step(model, schedule):
    side = 32 if model == "unet" else 6
    steps = 1 if model == "vpn" else 2
    compare(replace(TINY, model=model, schedule=schedule, steps=steps, height=side, width=side))


def test_predicted_bytes_of_patches_are_those_of_a_real_step():
    compare(replace(TINY, model="predrnn", schedule="plain", steps=2, height=7, width=6, patch=2))


def compare(training):
    found = memory.predicted(training, [1, 2])
    assert [row.batch for row in found] == [1, 2]
    for row in found:
        real = memory.tracked(replace(training, batch=row.batch))
        assert replace(row, how="", one_more=None, largest_16=None, largest_32=None) == replace(real, how="")
    assert found[0].one_more == found[1].peak - found[0].peak
    capacity = found[0].largest_16
    assert (
        memory.predicted(training, [capacity])[0].peak
        <= 16 * 2**30
        < memory.predicted(training, [capacity + 1])[0].peak
    )


def test_every_baseline_is_measured_in_each_of_its_patches():
    assert set(PATCHED) == {"convlstm", "predrnn", "predrnnpp"}


def main(monkeypatch, *options):
    size = ["--height", str(HEIGHT), "--width", str(WIDTH)]
    monkeypatch.setattr(sys, "argv", ["bench/memory.py", *size, *map(str, options)])
    memory.main()


def test_all_that_is_written(monkeypatch, tmp_path, capsys):
    suffixes = {"json": "json", "csv": "csv", "markdown": "md", "figure": "png"}
    files = {kind: tmp_path / f"rows.{suffix}" for kind, suffix in suffixes.items()}
    models = ["--only", "crevnet", "convlstm", "unet", "--preset", "tiny", "--schedule", "plain", "reversible"]
    written = [part for kind, file in files.items() for part in (f"--{kind}", file)]
    main(monkeypatch, *models, "--patch", 1, 2, "--steps", 2, "--how", "predicted", *written)
    rows = json.loads(files["json"].read_text())
    names = ["crevnet", "crevnet", "convlstm", "convlstm", "unet"]
    assert [row["model"] for row in rows] == names
    assert [row["patch"] for row in rows] == [1, 1, 1, 2, 1]
    assert [row["schedule"] for row in rows] == ["plain", "reversible", "plain", "plain", "plain"]
    sizes = {"precision": "32-true", "batch": 1, "steps": 2, "height": HEIGHT, "width": WIDTH, "how": "predicted"}
    assert all(row.items() >= sizes.items() for row in rows)
    assert [row["layers"] for row in rows] == [6, 6, None, None, None]
    for row in rows:
        assert row["parameters"] == row["gradients"] == row["optimizer"] // 2
        assert row["peak"] <= 4 * row["parameters"] + row["activations"] + row["transient"]
    with files["csv"].open() as file:
        lines = [*csv.DictReader(file)]
    assert [int(line["peak"]) for line in lines] == [row["peak"] for row in rows]
    text, markdown = capsys.readouterr().out, files["markdown"].read_text()
    assert "tiny, 6 layers" in text and "| unet | as published | plain |" in markdown and "torch 2" in markdown
    assert "python bench/memory.py --height" in markdown
    assert markdown.startswith("# Memory of a training step, predicted: GiB\n")
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


def test_a_page_is_named_by_what_varies_in_it(monkeypatch, tmp_path):
    page = tmp_path / "rows.md"
    options = ["--only", "crevnet", "--preset", "tiny", "--schedule", "plain", "--how", "predicted", "--markdown", page]
    main(monkeypatch, *options, "--steps", 2, 3, "--blocks", 1, 2)
    assert page.read_text().startswith("# Memory of a training step over time steps and layers, predicted: GiB\n")


def test_slopes_are_printed(monkeypatch, capsys):
    options = ["--only", "crevnet", "--preset", "tiny", "--schedule", "reversible", "--steps", 2, "--how", "tracked"]
    main(monkeypatch, *options, "--batch", 1, 2, "--blocks", 1, 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if " stores " in line] == [
        *["crevnet, tiny, reversible"] * 2,  # over layers, of 1 and of 2 sequences
        "crevnet, tiny, 6 layers, reversible",  # over the batch
        "crevnet, tiny, 12 layers, reversible",
    ]


def row(**options):
    given = {"activations": 3, "transient": 2, "peak": 9, "how": "predicted", **options}
    size = {"batch": 1, "steps": 2, "height": 4, "width": 5}
    names = {
        "model": "crevnet",
        "preset": "paper",
        "schedule": "plain",
        "precision": "32-true",
        "patch": 1,
        "layers": 36,
    }
    return Row(**{**names, **size, "parameters": 1, **given})


def test_lines_hold_rows_that_differ_in_one_thing_only():
    few, many, other, failed = row(), row(steps=7), row(schedule="checkpoint", steps=7), row(steps=9, peak=None)
    assert [*lines_over("steps", [many, other, few, failed])] == [[few, many]]
    assert [*lines_over("batch", [many, other, few])] == []
    assert [*lines_over("pixels", [row(height=8), few])] == [[few, row(height=8)]]
    assert [*lines_over("layers", [row(layers=12), few])] == [[row(layers=12), few]]


def test_remarks_compare_papers_patches_with_plain_crevnet():
    gib = 2**30
    crevnet, paper, patch_1 = (
        row(peak=2 * gib),
        row(model="predrnn", patch=4, peak=3 * gib),
        row(model="predrnn", peak=9),
    )
    others = [
        row(model="convlstm", patch=4, peak=gib),
        row(model="convlstm", patch=4, peak=gib, steps=9),
        row(model="vpn"),
    ]
    checkpointed = row(model="predrnnpp", patch=4, peak=gib, schedule="checkpoint")
    assert [*memory.remarks_on([crevnet, paper, patch_1, *others, checkpointed, row(schedule="reversible")])] == [
        f"{model} at its paper's patch takes {than} CrevNet (paper) under standard autograd, 2.00: "
        "it works at a 16th of the pixels"
        for model, than in (("predrnn", "3.00 GiB, more than"), ("convlstm", "1.00 GiB, no more than"))
    ]
    assert not [*memory.remarks_on([paper, *others])]


def test_labels_and_sizes():
    assert label(row()) == "crevnet, paper, 36 layers, plain" and label(row(), "layers") == "crevnet, paper, plain"
    assert label(row(model="convlstm", preset="", layers=None, patch=4)) == "convlstm, patch 4, plain"
    assert beyond_model(row()) == 5


def test_rows_that_vary_in_one_thing_are_drawn_as_lines():
    figure = memory_figure.draw(
        [row(), row(steps=7), row(steps=9, peak=None), row(preset="tiny"), row(preset="tiny", steps=5)]
    )
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["CrevNet paper", "CrevNet tiny"]
    (line,) = figure.axes[0].lines
    assert [*line.get_xdata()] == [2, 7] and [*line.get_ydata()] == [5 / 2**30] * 2


def test_out_of_memory_is_a_row(monkeypatch):
    def run_out(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory.revflow, "measure_memory", run_out)
    found = memory.on_cuda(TINY)
    assert found.note == "out of memory" and found.peak is None and found.parameters > 0
    assert memory.cells(replace(found, how="cuda"))[-2:] == ("out of memory", "cuda")


@pytest.mark.cuda
@pytest.mark.cuda
@pytest.mark.parametrize("schedule", ["plain", "reversible"])
def test_on_a_gpu_the_allocators_peak_is_near_the_predicted_one(schedule):
    training = replace(TINY, schedule=schedule, height=128, width=112, device=torch.device("cuda"))
    (found,) = memory.measure(training, "cuda", [2])
    (predicted,) = memory.predicted(replace(training, device=CPU), [2])
    assert 0.8 * predicted.peak < found.peak < 2 * predicted.peak + 2**27  # workspaces come on top
    assert found.reserved >= found.peak


@pytest.mark.parametrize(
    "options",
    [["--steps", "0"], ["--preset", "huge"], ["--batch", "many"], ["--schedule", "none"], ["--only", "lstm"],
     ["--csv", "/no/x.csv"], ["--figure", "x.txt"], ["--height", "1", "2"], ["--how", "cuda"]],
)  # fmt: skip
def test_wrong_options_end_in_a_line(monkeypatch, capsys, options):
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["memory.py", *options])
    with pytest.raises(SystemExit) as error:
        memory.main()
    assert error.value.code == 2 and options[0] in capsys.readouterr().err
