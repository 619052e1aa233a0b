"""What a training step takes in memory: CrevNet under each schedule, and the models that it is compared with.

    python bench/memory.py                                     # every model at 495 x 436
    python bench/memory.py --only crevnet --preset paper --schedule plain reversible --steps 3 7 11 --json memory.json

A step is forward, backward and fused Adam, with Adam's state there before it (bench/schedules.py). Every model sees frames of
three channels and a road map. Rows say how they were measured, and one table never mixes ways:

- "cuda": the allocator's own peak of the second step, and what it has reserved. A model that does not fit is a row.
- "tracked": the live tensors of a real step on the CPU; for small sizes.
- "predicted": the same count under fake tensors, which have shapes and no data: any size, nothing allocated. Equal to the
  tracked bytes. A device needs some more: for workspaces, the gaps of its allocator and, with CUDA, half a GiB of its own.

Without a GPU figures are predicted, unless --how selects another way.

Activations are what the forward pass keeps, beside the window of frames; gradients are counted as one more set of
parameters, Adam's state as two; transient is what the peak holds beyond all of these. States that are offloaded are not on
the device, and not counted. "One more" is what the peak grows by with another sequence in the batch.

Baselines are in their papers' settings, but for the patch: it is theirs at 4, with which they work at a sixteenth of the
pixels. VPN, PredNet and U-Net have none.
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

import report
import revflow
from crevnet import PRESETS
from device_memory import free, ran_out
from memory_figures import draw
from memory_row import AXES, GIB, Row, beyond_model, label, lines_over
from schedules import MODELS, PATCHED, SCHEDULES, Precision, Training

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
    report.show(f"A training step, {a.how}: GiB", HEADINGS, lines, LEFT)
    remarks = [*remarks_on(rows), *slopes_of(rows)]
    print("\n".join([about, *remarks]))
    sections = [report.markdown_table(HEADINGS, lines, LEFT), "\n".join(f"- {remark}" for remark in remarks)]
    report.write(a, rows, report.markdown(title(a), about, sections), draw)


def title(a: argparse.Namespace) -> str:
    """Of the page, with what varies in it beside models and schedules."""
    sizes = {"time steps": a.steps, "layers": a.blocks, "batches": a.batch, "frame sizes": a.height}
    varied = " and ".join(name for name, values in sizes.items() if len(values) > 1)
    return f"Memory of a training step{varied and f' over {varied}'}, {a.how}: GiB"


def options() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    schedules = ["plain", "checkpoint", "reversible-autoencoder", "reversible"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    many = partial(parser.add_argument, nargs="+")
    many("--only", choices=MODELS, default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    many("--preset", choices=PRESETS, default=["paper", "authors"], help="of CrevNet")
    many("--schedule", choices=SCHEDULES, default=schedules, metavar="SCHEDULE", help=", ".join(SCHEDULES))
    many("--patch", type=report.positive, default=[1, 2, 4], help="of ConvLSTM, PredRNN and PredRNN++")
    many("--blocks", type=report.positive, default=[None], help="CrevNet's in each stage, instead of the preset's")
    many("--steps", type=report.positive, default=[11], help="time steps")
    many("--batch", type=report.positive, default=[1])
    many("--height", type=report.positive, default=[495], help="one, or as many as --width")
    many("--width", type=report.positive, default=[436])
    parser.add_argument("--precision", choices=get_args(Precision), default="32-true")
    parser.add_argument("--how", choices=["cuda", "tracked", "predicted"], default="cuda" if gpu else "predicted")
    report.add_outputs(parser)
    a = parser.parse_args()
    if a.how == "cuda" and not gpu:
        parser.error("--how cuda: there is no CUDA device here; predicted figures need none")
    if len(a.height) != len(a.width):
        parser.error(f"--height and --width must be equally many; got {len(a.height)} and {len(a.width)}")
    return a


def all_of(a: argparse.Namespace, device: torch.device) -> Iterator[Training]:
    """Each model in its settings, CrevNet first, and each of these at each size."""
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
    """The rows of each training. Predictions take a core each."""
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
    kept = []

    def step(batch: int) -> None:
        def watch(forward: Callable[[], Tensor]) -> Tensor:
            loss, bytes_kept = keeping(forward, training.device)
            kept.append(divmod(bytes_kept, batch))  # of a sequence, and fixed
            return loss

        next(replace(training, batch=batch).train(watch))

    memory = revflow.predict_memory(step)
    ((sequence, fixed),) = kept
    largest = {f"largest_{capacity}": memory.largest_batch(capacity * GIB) for capacity in CAPACITIES}
    return [
        replace(
            row(replace(training, batch=batch), "predicted", fixed + sequence * batch, memory.peak(batch)),
            one_more=memory.peak(batch + 1) - memory.peak(batch),
            **largest,
        )
        for batch in batches
    ]


def tracked(training: Training) -> Row:
    kept = []

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        loss, bytes_kept = keeping(forward, training.device)
        kept.append(bytes_kept)
        return loss

    peak = revflow.measure_memory(lambda: next(training.train(watch)), device=training.device).peak
    return row(training, "tracked", kept[0], peak)


def on_cuda(training: Training) -> Row:
    """The second step's; what cuDNN and the allocator do once is in the first."""
    device, kept, trained = training.device, [], []

    def watch(forward: Callable[[], Tensor]) -> Tensor:
        loss, bytes_kept = keeping(forward, device)
        kept.append(bytes_kept)
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
            row(training, "cuda", kept[-1], peak),
            reserved=torch.cuda.max_memory_reserved(device) - cached,
            allocated=torch.cuda.max_memory_allocated(device) - blocks,
            first=first.peak,
        )
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return replace(row(training, "cuda"), note="out of memory")


def keeping(forward: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """The loss, and the bytes that its graph keeps."""
    losses: list[Tensor] = []
    kept = revflow.measure_memory(lambda: losses.append(forward()), device=device).kept
    return losses[0], kept


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
    """The row below `HEADINGS`; under the largest batches CUDA's rows have what is reserved, and a note."""
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
                less = "no more than" if r.peak <= crevnet.peak else "more than"
                yield (
                    f"{r.model} at its paper's patch takes {r.peak / GIB:.2f} GiB, {less} plain CrevNet "
                    f"({crevnet.preset}), {crevnet.peak / GIB:.2f}: it works at a {r.patch**2}th of the pixels"
                )


def slopes_of(rows: Iterable[Row]) -> Iterator[str]:
    """What one more time step, layer or sequence takes, where rows differ in nothing else."""
    for axis, unit in AXES.items():
        for line in lines_over(axis, rows):
            first, last = line[0], line[-1]
            count = getattr(last, axis) - getattr(first, axis)
            kept, beyond = (
                (size(last) - size(first)) / count / 2**20 for size in (lambda r: r.activations, beyond_model)
            )
            yield f"{label(first, axis)}: a {unit} more keeps {kept:,.3g} MiB; the peak beyond the model grows by {beyond:,.3g}"


if __name__ == "__main__":
    main()
