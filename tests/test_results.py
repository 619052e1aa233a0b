"""Tables and figures in the README and in docs/ are those of the stored results, which bench/ wrote."""

import re

import pytest
from documents import RESULTS, ROOT, prose, stored, table

from kit.experiment_plan import CREVNET, WIDTHS
from kit.memory_row import GIB, Row
from pages.experiment_tables import COLUMNS, over_seeds
from pages.memory_figure import name_of


def test_memory_of_crevnet():
    expected = {}
    for line in stored("memory-predicted.csv"):
        given = line | {name: int(line[name] or 0) for name in ("patch", "peak", "one_more")}
        row = Row(**given)
        figures = f"{row.peak / GIB:.1f}", f"{row.one_more / GIB:.2f}", row.largest_16, row.largest_32
        expected[name_of(row), row.schedule] = [*figures]
    _, rows = table("docs/crevnet.md", "model, 495 x 436")
    assert len(rows) == 17
    for name, schedule, *figures in rows:
        assert figures == expected[name, schedule]
    batches = [expected["CrevNet paper", schedule][2] for schedule in ("reversible", "plain")]
    assert "a batch of {} sequences is predicted to fit in 16 GiB, instead of {}".format(*batches) in prose(
        ROOT / "README.md"
    )


def test_memory_against_depth():
    gib = {
        (line["schedule"], int(line["layers"])): (int(line["activations"]) + int(line["transient"])) / GIB
        for line in stored("memory-depth.csv")
    }
    plain, checkpoint, reversible = (
        [f"{gib[schedule, layers]:.2f}" for layers in (12, 72)] for schedule in ("plain", "checkpoint", "reversible")
    )
    assert len(set(reversible)) == 1
    sentence = (
        "From 12 to 72 layers, it grows from {} to {} GiB with standard autograd and from {} to {} GiB with checkpointing. "
        "It stays at {} GiB with revflow"
    )
    assert sentence.format(*plain, *checkpoint, reversible[0]) in prose(ROOT / "README.md")


METHODS = {
    "standard autograd": "plain",
    "torch.utils.checkpoint, every block": "checkpoint every 1",
    "memcnn 1.5.2": "memcnn per block",
    "RevTorch 0.2.4": "revtorch per stage",
    "revlib 1.7.2": "revlib per stage",
    "revflow": "revflow min",
    'revflow, memory_budget="max"': "revflow max",
}


def test_methods():
    expected = by_method("speed-cpu.csv", "convolutions")
    versions = prose(RESULTS / "speed-cpu.md")
    headings, rows = table("README.md", "method")
    assert headings[1:4] == ["memory", "time", "evaluations of F"] and [row[0] for row in rows] == [*METHODS]
    for name, memory, time, evaluations, _ in rows:
        line = expected[METHODS[name]]
        assert memory == f"{float(line['peak']) / 2**20:.2f} MiB"
        assert (time, evaluations) == (f"{float(line['time_ratio']):.2f}×", f"{float(line['evaluations']):.2f}")
        assert all(version in versions for version in re.findall(r"\w+ \d\S+", name.lower()))
    ratios = [f"{float(expected[name]['time_ratio']):.2f}×" for name in ("revflow min", "checkpoint every 1")]
    text = prose(ROOT / "README.md")
    assert "revflow took {} standard autograd's time and checkpointing {}".format(*ratios) in text


def test_scores_of_the_demo():
    text = (RESULTS / "crevnet-tiny-cpu.md").read_text(encoding="utf-8")
    expected = {round(float(figure), 5) for figure in re.findall(r"\d\.\d{3}e-\d", text)}
    _, rows = table("docs/crevnet.md", "forecast")
    assert len(rows) == 6
    assert {float(score) for _, score in rows} <= expected


def by_method(results, network):
    return {
        f"{line['method']} {line['setting']}".strip(): line for line in stored(results) if line["network"] == network
    }


@pytest.mark.parametrize("network", ["tiny", "convolutions", "transformer"])
def test_time(network):
    expected = by_method("speed-cpu.csv", network)
    headings, rows = table("docs/results.md", "time, standard autograd = 1")
    assert network in headings and len(rows) > 5
    for method, *times in rows:
        assert times[headings.index(network) - 1] == f"{float(expected[method]['time_ratio']):.2f}"


def test_time_of_compiled_steps():
    lines = stored("compiled-cpu.csv")
    expected = {
        (line["network"], f"{line['method']}, {line['setting'] or 'eager'}"): f"{float(line['time_ratio']):.2f}"
        for line in lines
    }
    headings, rows = table("docs/compile.md", "compiled and eager steps")
    assert len(rows) == 5
    for name, *times in rows:
        assert times == [expected[network, name] for network in headings[1:]]
    for setting in ("one graph", "eager"):
        times = [expected[network, f"revflow, {setting}"] for network in ("tiny", "mlp", "convolutions")]
        assert "{}, {} and {} times".format(*times) in prose(RESULTS / "compiled-cpu.md")


@pytest.mark.parametrize("network", ["convolutions", "transformer"])
def test_memory_against_time(network):
    expected = by_method("budget-cpu.csv", network)
    headings, rows = table("docs/results.md", "memory and time, standard autograd = 1")
    column = headings.index(f"{network}: memory")
    assert len(rows) > 5
    for cells in rows:
        line = expected[cells[0]]
        memory = float(line["peak"]) / float(expected["plain"]["peak"])
        assert cells[column : column + 2] == [f"{memory:.2f}", f"{float(line['time_ratio']):.2f}"]


def test_memory_against_checkpointing():
    expected = by_method("budget-cpu.csv", "convolutions")
    _, rows = table("docs/which-when.md", "method, for 32 convolutional blocks")
    assert len(rows) == 3
    for method, memory, time in rows:
        line = expected[method]
        assert memory == f"{float(line['peak']) / float(expected['plain']['peak']):.2f}"
        assert time == f"{float(line['time_ratio']):.2f}"


def test_memory_of_networks_with_stages():
    gib = {}
    for line in stored("stages.csv"):
        gib.setdefault(line["network"], {})[line["way"]] = int(line["peak"]) / GIB
    _, rows = table("docs/which-when.md", "network")
    assert [cells for _, *cells in rows] == [[f"{peak:.2f}" for peak in of.values()] for of in gib.values()]
    assert all([*of] == ["plain", "checkpoint", "reversible", "mixed"] for of in gib.values())
    for name in ("ResNet-50", "SegResNet"):
        assert gib[name]["checkpoint"] < gib[name]["reversible"]
    resnet, unet, deep_resnet, deep_unet = (
        of["mixed"] / of["checkpoint"]
        for of in map(gib.get, ("ResNet-50", "SegResNet", "ResNet-152", "SegResNet, deep"))
    )
    text = prose(ROOT / "docs/which-when.md")
    assert f"another {1 - resnet:.0%} for ResNet-50 and less than 1% for SegResNet" in text and 0.99 < unet < 1
    assert "reduced to less than half for ResNet-152 and to two thirds for SegResNet" in text
    assert deep_resnet < 0.5 and deep_unet == pytest.approx(2 / 3, abs=0.01)
    said = "checkpointing each block uses {:.2f} GiB, revflow {:.2f} GiB, and both methods together {:.2f} GiB"
    assert said.format(*[*gib["ResNet-50"].values()][1:]) in prose(ROOT / "docs/results.md")


@pytest.mark.parametrize(
    ("first_heading", "named"),
    [
        ("MSE, CrevNet", [("stages", stage) for stage in COLUMNS]),
        ("MSE, at equal memory and time", [("models", name) for name in (CREVNET, *WIDTHS)]),
    ],
)
def test_the_experiment(first_heading, named):
    headings, rows = table("docs/experiment.md", first_heading)
    assert len(headings) == 1 + len(named)
    for data, *cells in rows:
        if data.startswith("the paper"):
            continue
        name, seeds = re.fullmatch(r"(.+), (\d) seeds?", data).groups()
        lines = stored(f"experiment-{name.replace('synthetic ', '').replace(' ', '-')}.csv")
        assert len({line["seed"] for line in lines}) == int(seeds)
        for cell, (kind, what) in zip(cells, named, strict=True):
            found = [float(line["mse"]) for line in lines if (line["table"], line["name"]) == (kind, what)]
            assert cell == over_seeds(found), (data, what)


def test_the_models_that_score_better_are_named():
    _, rows = table("docs/experiment.md", "MSE, at equal memory and time")
    crevnet, *_, unet = (float(cell.split()[0]) for cell in rows[0][1:])
    said = "At equal training time, a U-Net scores better than CrevNet on synthetic cities"
    assert unet < crevnet and said in prose(ROOT / "README.md")


def test_each_picture_was_drawn_by_a_command_that_is_told():
    told = " ".join(page.read_text(encoding="utf-8") for page in RESULTS.glob("*.md"))
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        of_the_demo = picture.stem == "demo" or picture.stem.startswith("figures-")
        assert of_the_demo or re.search(rf"--(figure|out) docs/images/{picture.name}", told), picture


def test_each_page_of_results_tells_its_command_and_the_versions():
    for page in RESULTS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"(python (bench|examples)/|crevnet fit|crevnet evaluate)", text), page
        assert re.search(r"torch 2\.\d+", text) and re.search(r"20\d\d-\d\d-\d\d", text), page
