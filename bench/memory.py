"""Memory of a training step: CrevNet under each schedule, and the models that it is compared with.

    python bench/memory.py                                     # every model at 495 x 436
    python bench/memory.py --only crevnet --preset paper --schedule plain reversible --steps 3 7 11 --json memory.json

A step is forward, backward and fused Adam, whose state exists before it (bench/kit/schedules.py). Every model gets frames of
three channels and a road map. Each row names its way of measuring, and one table never mixes ways:

- "cuda": the allocator's own peak of the second step, and its reserved bytes. A model that does not fit is a row.
- "tracked": the live tensors of a real step on the CPU; for small sizes.
- "predicted": the same count under fake tensors, which have shapes and no data: any size, nothing allocated. It equals the
  tracked bytes. A device needs more: for workspaces, the gaps of its allocator and, with CUDA, half a GiB of its own.

Without a GPU figures are predicted, unless --how selects another way.

Activations are the tensors that the forward pass stores, without the window of frames. Gradients count as one more set of
parameters, and Adam's state as two. The transient is the rest of the peak. Offloaded states are not on the device, and not
counted. "One more" is the growth of the peak per additional sequence in the batch.

Baselines have their papers' settings, except for the patch. The papers' patch is 4, with which the models work at a sixteenth
of the pixels. VPN, PredNet and U-Net have none.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import get_args

import torch
from torch import Tensor

import revflow
from crevnet import MODELS, PRESETS
from kit.device_memory import free, ran_out
from kit.memory_row import AXES, GIB, Row, beyond_model, label, lines_over
from kit.schedules import PATCHED, SCHEDULES, Precision, Training
from pages import report
from pages.memory_figure import draw
from pages.tables import markdown_table, show

CAPACITIES = (16, 32)
PAPERS_PATCH = 4
"""Of ConvLSTM, PredRNN and PredRNN++."""


def main() -> None:
    a = options()
    device = torch.device("cuda" if a.how == "cuda" else "cpu")
    from rich.progress import track

    trainings = [*all_of(a, device)]
    progress = track(measured(trainings, a.how, a.batch), "measuring", total=len(trainings))
    rows = [row for found in progress for row in found]
    about = report.machine(device)
    lines = [cells(row) for row in rows]
    show(f"A training step, {a.how}: GiB", HEADINGS, lines, LEFT)
    remarks = [*remarks_on(rows), *slopes_of(rows)]
    print("\n".join([about, *remarks]))
    sections = [markdown_table(HEADINGS, lines, LEFT), "\n".join(f"- {remark}" for remark in remarks)]
    report.write(a, rows, report.markdown(title(a), about, sections), draw)


def title(a: argparse.Namespace) -> str:
    """Of the page, with the sizes that vary in it."""
    sizes = {"time steps": a.steps, "layers": a.blocks, "batches": a.batch, "frame sizes": a.height}
    varied = " and ".join(name for name, values in sizes.items() if len(values) > 1)
    return f"Memory of a training step{varied and f' over {varied}'}, {a.how}: GiB"


def options() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    schedules = ["plain", "checkpoint", "reversible-autoencoder", "reversible"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    many = partial(parser.add_argument, nargs="+")
    many("--only", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"models: {', '.join(MODELS)} (all)")
    many("--preset", choices=PRESETS, default=["paper", "authors"], help="presets of CrevNet (paper authors)")
    listed = f"schedules: {', '.join(SCHEDULES)} ({' '.join(schedules)})"
    many("--schedule", choices=SCHEDULES, default=schedules, metavar="SCHEDULE", help=listed)
    many(
        "--patch",
        type=report.positive,
        default=[1, 2, 4],
        help="patches of ConvLSTM, PredRNN and PredRNN++, pixels (1 2 4)",
    )
    many("--blocks", type=report.positive, default=[None], help="numbers of blocks per stage of CrevNet (the preset's)")
    many("--steps", type=report.positive, default=[11], help="numbers of time steps (11)")
    many("--batch", type=report.positive, default=[1], help="batch sizes, sequences (1)")
    many("--height", type=report.positive, default=[495], help="heights of the frames, pixels, one per width (495)")
    many("--width", type=report.positive, default=[436], help="widths of the frames, pixels (436)")
    parser.add_argument("--precision", choices=get_args(Precision), default="32-true", help="precision (32-true)")
    ways = ["cuda", "tracked", "predicted"]
    parser.add_argument(
        "--how", choices=ways, default="cuda" if gpu else "predicted", help="way of measuring (cuda if there is a GPU)"
    )
    report.add_outputs(parser)
    a = parser.parse_args()
    if a.how == "cuda" and not gpu:
        parser.error("--how cuda: there is no CUDA device here; predicted figures need none")
    if len(a.height) != len(a.width):
        parser.error(f"--height and --width must be equally many; got {len(a.height)} and {len(a.width)}")
    return a


def all_of(a: argparse.Namespace, device: torch.device) -> Iterator[Training]:
    """Each model in its settings and sizes, CrevNet first."""
    for steps, (height, width) in product(a.steps, zip(a.height, a.width, strict=True)):
        size = {
            "precision": a.precision,
            "batch": 1,
            "steps": steps,
            "height": height,
            "width": width,
            "device": device,
        }
        if "crevnet" in a.only:
            for preset, blocks, schedule in product(a.preset, a.blocks, a.schedule):
                yield Training(preset, schedule, blocks=blocks, **size)
        for model in (m for m in MODELS if m in a.only and m != "crevnet"):
            schedules = [s for s in a.schedule if s in ("plain", "checkpoint")]
            for patch, schedule in product(a.patch if model in PATCHED else [1], schedules):
                yield Training("paper", schedule, model=model, patch=patch, **size)


def measured(trainings: list[Training], how: str, batches: list[int]) -> Iterator[list[Row]]:
    """The rows of each training. Predictions use one core each."""
    work = partial(measure, how=how, batches=batches)
    if how != "predicted" or len(trainings) == 1:
        yield from map(work, trainings)
        return
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(work, trainings)


def measure(training: Training, how: str, batches: list[int]) -> list[Row]:
    """A row for each batch."""
    if how == "predicted":
        return predicted(training, batches)
    return [(on_cuda if how == "cuda" else tracked)(replace(training, batch=batch)) for batch in batches]


def predicted(training: Training, batches: list[int]) -> list[Row]:
    stored: list[tuple[int, int]] = []

    def step(batch: int) -> None:
        def watch(forward: Callable[[], Tensor]) -> Tensor:
            loss, activations = storing(forward, training.device)
            stored.append(divmod(activations, batch))  # per sequence, and fixed
            return loss

        next(replace(training, batch=batch).train(watch))

    memory = revflow.predict_memory(step)
    ((sequence, fixed),) = stored
    largest_16, largest_32 = (memory.largest_batch(capacity * GIB) for capacity in CAPACITIES)
    return [
        replace(
            row(replace(training, batch=batch), "predicted", fixed + sequence * batch, memory.peak(batch)),
            one_more=memory.peak(batch + 1) - memory.peak(batch),
            largest_16=largest_16,
            largest_32=largest_32,
        )
        for batch in batches
    ]


def tracked(training: Training) -> Row:
    stored: list[int] = []

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        loss, activations = storing(forward, training.device)
        stored.append(activations)
        return loss

    peak = revflow.measure_memory(lambda: next(training.train(watch)), device=training.device).peak
    return row(training, "tracked", stored[0], peak)


def on_cuda(training: Training) -> Row:
    """The second step's. The first includes the one-time work of cuDNN and the allocator."""
    device = training.device
    stored: list[int] = []
    trained: list[Iterator[None]] = []

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        loss, activations = storing(forward, device)
        stored.append(activations)
        return loss

    def warm_up() -> Iterator[None]:
        steps = training.train(watch)
        next(steps)
        return steps

    free()
    blocks, cached = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)  # others'
    try:
        first = revflow.measure_memory(lambda: trained.append(warm_up()), device=device)
        torch.cuda.reset_peak_memory_stats(device)
        peak = first.kept + revflow.measure_memory(lambda: next(trained[0]), device=device).peak
        return replace(
            row(training, "cuda", stored[-1], peak),
            reserved=torch.cuda.max_memory_reserved(device) - cached,
            allocated=torch.cuda.max_memory_allocated(device) - blocks,
            first=first.peak,
        )
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return replace(row(training, "cuda"), note="out of memory")


def storing(forward: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """The loss, and the bytes that its graph stores."""
    losses: list[Tensor] = []
    memory = revflow.measure_memory(lambda: losses.append(forward()), device=device)
    return losses[0], memory.kept


def row(t: Training, how: str, activations: int | None = None, peak: int | None = None) -> Row:
    crevnet = t.model == "crevnet"
    layers = 3 * sum(t.config.blocks) if crevnet else None
    parameters = t.parameters()
    setting = t.model, t.preset if crevnet else "", t.schedule, t.precision, t.patch, layers
    size = t.batch, t.steps, t.height, t.width, how, parameters
    if activations is None or peak is None:
        return Row(*setting, *size)
    transient = max(peak - 4 * parameters - activations, 0)
    return Row(*setting, *size, parameters, 2 * parameters, activations, transient, peak)


HEADINGS = (
    "model", "setting", "schedule", "frame", "batch", "steps", "parameters", "gradients", "Adam", "activations", "transient",
    "peak", "one more", "in 16 GiB", "in 32 GiB", "how",
)  # fmt: skip
LEFT = ("model", "setting", "schedule", "frame", "how")


def cells(r: Row) -> tuple[str, ...]:
    """The row below `HEADINGS`. CUDA's rows have their reserved bytes and a note below the largest batches."""
    patch = f"patch {r.patch}" + ", as published" * (r.patch == PAPERS_PATCH)
    setting = f"{r.preset}, {r.layers} layers" if r.layers else patch if r.model in PATCHED else "as published"
    sizes = (r.parameters, r.gradients, r.optimizer, r.activations, r.transient, r.peak, r.one_more)
    largest = ["" if n is None else f"{n:,}" for n in (r.largest_16, r.largest_32)]
    if r.how == "cuda":
        largest = ["" if r.reserved is None else f"{r.reserved / GIB:.2f} reserved", r.note]
    what = r.model, setting, r.schedule, f"{r.height} x {r.width}", str(r.batch), str(r.steps)
    return *what, *("" if size is None else f"{size / GIB:,.2f}" for size in sizes), *largest, r.how


def remarks_on(rows: Iterable[Row]) -> Iterator[str]:
    """How the recurrent models at their papers' patch compare with CrevNet under standard autograd."""
    plain = [r for r in rows if r.schedule == "plain" and r.peak is not None]
    size = ("batch", "steps", "height", "width", "precision")
    for crevnet in (r for r in plain if r.model == "crevnet"):
        for r in plain:
            same = all(getattr(r, name) == getattr(crevnet, name) for name in size)
            if same and r.model in PATCHED and r.patch == PAPERS_PATCH:
                peak, crevnets = r.measured_peak / GIB, crevnet.measured_peak / GIB
                less = "no more than" if peak <= crevnets else "more than"
                yield (
                    f"{r.model} at its paper's patch takes {peak:.2f} GiB, {less} CrevNet ({crevnet.preset}) under "
                    f"standard autograd, {crevnets:.2f}: it works at a {r.patch**2}th of the pixels"
                )


def slopes_of(rows: Iterable[Row]) -> Iterator[str]:
    """Memory per additional time step, layer, sequence or pixel, of rows that differ in nothing else."""
    for axis, unit in AXES.items():
        for line in lines_over(axis, rows):
            first, last = line[0], line[-1]
            count = getattr(last, axis) - getattr(first, axis)
            stored, beyond = (
                (size(last) - size(first)) / count / 2**20 for size in (lambda r: r.activations or 0, beyond_model)
            )
            yield (
                f"{label(first, axis)}: an additional {unit} stores {stored:,.3g} MiB; "
                f"the peak beyond the model grows by {beyond:,.3g}"
            )


if __name__ == "__main__":
    main()
