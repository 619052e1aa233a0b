"""A row of bench/memory.py, and rows that differ in one thing only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One training step; sizes in pixels, memory in bytes."""

    model: str
    preset: str
    schedule: str
    precision: str
    patch: int
    layers: int | None
    """Of CrevNet's autoencoder."""
    batch: int
    steps: int
    height: int
    width: int
    how: str
    parameters: int
    gradients: int | None = None
    optimizer: int | None = None
    activations: int | None = None
    transient: int | None = None
    peak: int | None = None
    one_more: int | None = None
    """By what the peak grows with another sequence in the batch; of predicted rows."""
    largest_16: int | None = None
    """The largest batch in 16 GiB; of predicted rows (bench/capacity.py tries batches on a GPU)."""
    largest_32: int | None = None
    reserved: int | None = None
    """What the allocator holds; of CUDA's rows, as are the next two."""
    allocated: int | None = None
    """The peak of the blocks that the allocator has handed out, which are rounded up."""
    first: int | None = None
    """The first step's peak, with what is done once."""
    note: str = ""

    @property
    def pixels(self) -> int:
        """Of a frame."""
        return self.height * self.width


AXES = {"steps": "time step", "layers": "layer", "batch": "sequence", "pixels": "pixel"}
"""What rows may be compared along, and its unit."""

SETTING = ("model", "preset", "schedule", "precision", "patch", "layers", "batch", "steps", "pixels", "how")


def label(row: Row, axis: str = "") -> str:
    """What is measured, but for what the axis shows."""
    layers = f"{row.layers} layers" if row.layers and axis != "layers" else ""
    patch = "" if row.preset else f"patch {row.patch}"
    return ", ".join(part for part in (row.model, row.preset, layers, patch, row.schedule) if part)


def beyond_model(row: Row) -> int:
    """What the peak holds beyond parameters, gradients and Adam's state."""
    assert row.activations is not None and row.transient is not None
    return row.activations + row.transient


def lines_over(axis: str, rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that differ along the axis alone, in its order; only where there are two at least, and figures."""
    families: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.peak is not None:
            setting = tuple(getattr(row, name) for name in SETTING if name != axis)
            families.setdefault(setting, []).append(row)
    for family in families.values():
        line = sorted(family, key=lambda row: getattr(row, axis) or 0)
        if getattr(line[0], axis) != getattr(line[-1], axis):
            yield line
