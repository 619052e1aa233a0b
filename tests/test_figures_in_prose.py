"""Figures in the sentences and hand-written tables of the README, docs/ and examples/ are those of stored results, or follow from
what is said beside them."""

import re

import pytest
import torch
from documents import RESULTS, ROOT, prose, stored, table

import revflow
from crevnet import MODELS, make_network
from crevnet.networks.config import PRESETS

# A page's sentence, and the same figures as a page of results has them.
QUOTED = [
    ("README.md", "on a synthetic city in 3 to 6 minutes", "crevnet-tiny-cpu.md", ["5 min 35 s", "3 min 8 s"]),
    ("docs/crevnet.md", "draws its predictions: 3 to 6 minutes", "crevnet-tiny-cpu.md", ["5 min 35 s", "3 min 8 s"]),
    (
        "docs/crevnet.md",
        "trained for at most 3.5 minutes",
        "crevnet-tiny-cpu.md",
        ["stopped at its limit of 3.5 minutes"],
    ),
    ("docs/crevnet.md", "scores on two held-out days", "crevnet-tiny-cpu.md", ["Two held-out days"]),
    (
        "docs/exact.md",
        "The relative error of the gradients is 5.5e-7 with 100 blocks and 8.8e-6 with 1,000 blocks",
        "drift-cpu.md",
        ["5.5e-07", "8.8e-06"],
    ),
    ("docs/exact.md", "With 100 blocks, the relative error of the gradients is 5.2e-3", "drift-cpu.md", ["5.2e-03"]),
    ("docs/exact.md", "takes 4 to 6% longer on the CPU", "exact-cpu.md", ["+4.2 %", "+6.1 %"]),
    ("docs/exact.md", "and 6 to 8% longer for gated", "exact-cpu.md", ["+5.6 %", "+7.9 %"]),
    (
        "docs/promises.md",
        "in float32, 3e-6 for an untrained network and 4e-3 for the network trained by `make demo`",
        "crevnet-tiny-cpu.md",
        ["3.7e-3 in float32", "1.7e-6 to 2.6e-6"],
    ),
    (
        "docs/crevnet.md",
        "47.5 MiB at 495 x 436",
        "memory-steps.md",
        ["layers, reversible: an additional time step stores 47.5 MiB"],
    ),
    (
        "docs/crevnet.md",
        "Standard autograd stores 527 MiB",
        "memory-steps.md",
        ["plain: an additional time step stores 527 MiB"],
    ),
    (
        "docs/crevnet.md",
        "checkpointing of every block stores 98 MiB",
        "memory-steps.md",
        ["checkpoint: an additional time step stores 98.3 MiB"],
    ),
    (
        "docs/crevnet.md",
        "the relative error is 2.7e-5 to 1.1e-3. For a window of uniform noise, it is 1.5e-3. The errors of standard autograd in "
        "float32 are smaller: 5.0e-7 to 1.3e-5",
        "rounding-cpu.md",
        [
            "2.7% | 1.3e-05 | 1.1e-03 |",
            "0.5% | 5.0e-07 | 2.7e-05 |",
            "1.2% | 7.6e-07 | 1.1e-03 |",
            "1.4e-06 | 1.5e-03 |",
        ],
    ),
    (
        "docs/crevnet.md",
        "every third time step and recomputes the others. A batch of 24",
        "memory-steps.md",
        ["7.10 | 0.37 | 24 |"],
    ),
    (
        "docs/scaling.md",
        "4.3 with a single process, 5.3 with DDP, and 4.1 with FSDP",
        "scaling-memory-cpu.md",
        ["4.27", "5.28", "4.13"],
    ),
    ("docs/scaling.md", "7.2 minutes with a batch of 1", "paper-step-cpu.md", ["time: 7.2 min"]),
    ("docs/scaling.md", "`paper` preset has 446,340,532 parameters", "paper-step-cpu.md", ["parameters: 446,340,532"]),
    (
        "docs/data.md",
        "reads 677 frames per second instead of 138. One worker process reads 320 instead of 114",
        "loading-cpu.md",
        [
            "| repacked | 61 | 0 | cold | 677 |",
            "| h5py's chunks | 76 | 0 | cold | 138 |",
            "| repacked | 61 | 1 | cold | 320 |",
            "| h5py's chunks | 76 | 1 | cold | 114 |",
        ],
    ),
    ("docs/results.md", "off by 2.7e-5 to 1.1e-3", "rounding-cpu.md", ["1.1e-03", "2.7e-05"]),
    (
        "docs/results.md",
        "the gap is 0.01 to 0.03",
        "budget-cpu.md",
        ["the gap is 0.01 to 0.03", "at 17 of 27 points"],
    ),
    (
        "docs/which-when.md",
        "saves at most 3% of the time of a standard autograd step",
        "budget-cpu.md",
        ["the gap is 0.01 to 0.03"],
    ),
    (
        "docs/coming-from.md",
        "this adds 13% of the duration of a standard autograd step",
        "budget-cpu.md",
        ["1.39 for convolutions compared with 1.26"],
    ),
    (
        "docs/experiment.md",
        "it completes 830 steps in the time that the U-Net needs for 7,145",
        "experiment-cities.md",
        ["| 830 |", "| 7,145 |"],
    ),
    (
        "docs/experiment.md",
        "| training time of each model | 5 minutes on one core | 8 minutes on one core |",
        "experiment-cities.md",
        ["each model trained for 5 minutes on one core"],
    ),
    (
        "docs/experiment.md",
        "5 minutes on one core | 8 minutes on one core |",
        "experiment-air-traffic.md",
        ["each model trained for 8 minutes on one core"],
    ),
    ("docs/moving-mnist.md", "after 72 steps on a CPU", "moving-mnist-cpu.md", ["72 steps with batches of 2"]),
]


@pytest.mark.parametrize(("page", "sentence", "results", "figures"), QUOTED)
def test_a_sentence_has_the_figures_of_a_stored_result(page, sentence, results, figures):
    assert sentence in prose(ROOT / page)
    source = prose(RESULTS / results)
    assert all(figure in source for figure in figures)


@pytest.mark.parametrize("row", table("examples/README.md", "file")[1], ids=lambda row: row[0])
def test_what_an_example_reached(row):
    file, _, reached, time = row
    results = (RESULTS / "examples-cpu.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {file.removesuffix('.py')}\n(.*?)(?=^## |\Z)", results, re.M | re.S)[1]
    number = r"\d[\d.,]*(?:e-\d+)?"
    known = {found.rstrip(".,") for found in re.findall(number, section)}
    told = {found.rstrip(".,") for found in re.findall(number, reached + " " + time)}
    assert told and told <= known, told - known


def test_what_the_autoencoder_alone_leaves_is_more_than_three_quarters():
    assert "the predictor's activations, which account for more than three quarters of the total" in prose(
        ROOT / "docs/crevnet.md"
    )
    kept = {(line["preset"], line["schedule"]): int(line["one_more"]) for line in stored("memory-predicted.csv")}
    for preset in ("paper", "authors"):
        assert 0.75 < kept[preset, "reversible-autoencoder"] / kept[preset, "plain"] < 0.8


def test_bytes_that_devices_exchange():
    copy = 4 * 446_340_532
    assert f"4 x 446,340,532 = {copy / 1e9:.2f} GB" in prose(ROOT / "docs/scaling.md")
    _, rows = table("docs/scaling.md", "devices")
    for devices, sent, rate in rows:
        n = int(devices)
        bytes_ = 2 * (n - 1) / n * copy
        assert sent == f"2 x {n - 1}/{n} x {copy / 1e9:.2f} = {bytes_ / 1e9:.2f} GB"
        assert rate == f"{bytes_ / 1e9 / 0.1:.0f} / T"


def test_memory_of_a_device_among_several():
    copy = 4 * 446_340_532 / 2**30
    text = prose(ROOT / "docs/scaling.md")
    assert f"One copy of the `paper` model's parameters takes up {copy:.2f} GiB" in text
    _, rows = table("docs/scaling.md", "`paper`, without activations")
    gib = [[re.sub(" GiB.*", "", cell) for cell in cells] for _, *cells in rows]
    assert gib == [
        [f"{4 * copy:.1f}", f"{5 * copy:.1f}", f"{5 * copy:.1f}"],
        ["", *(f"{4 / n * copy:.1f}" for n in (8, 64))],
        ["", *(f"{(2 + 4 / n) * copy:.1f}" for n in (8, 64))],
    ]
    spared = [f"{(2 - 4 / n) * copy:.1f}" for n in (8, 64)]
    assert f"activations, FSDP saves {spared[0]} to {spared[1]} GiB per device" in text


def test_steps_and_ranges_of_grids():
    _, rows = table("docs/exact.md", "bits")
    assert len(rows) == 8
    for bits, step, *ranges in rows:
        grid = revflow.Grid(bits=int(re.match(r"\d+", bits)[0]))
        values = [grid.unit, grid.limit(torch.float32), grid.limit(torch.float64)]
        for told, value in zip([step, *ranges], values, strict=True):
            assert float(told.replace(",", "")) == pytest.approx(value, rel=0.05)


def test_parameters_of_the_models_that_are_compared():
    """The baselines' on frames alone; of the recurrent ones, at patch 1."""
    _, rows = table("docs/benchmarks.md", "model")
    assert len(rows) == 8
    for name, _, parameters, _ in rows:
        kind, *preset = name.lower().replace("-", "").replace("+", "p").split()
        at_patch_1 = {"patch": 1} if kind in ("convlstm", "predrnn", "predrnnpp") else {}
        config = PRESETS[preset[0]] if preset else MODELS[kind].config(static=(), **at_patch_1)
        with torch.device("meta"):
            network = make_network(config)
        assert parameters == f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M", name
