"""A row of bench/memory.py, and rows that differ in one setting only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One training step. Sizes are in pixels, memory in bytes."""

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
    """Growth of the peak per additional sequence in the batch; of predicted rows."""
    largest_16: int | None = None
    """The largest batch in 16 GiB; of predicted rows (bench/capacity.py tries batches on a GPU)."""
    largest_32: int | None = None
    reserved: int | None = None
    """Memory that the allocator holds; of CUDA's rows, as are the next two."""
    allocated: int | None = None
    """The peak of the blocks that the allocator has handed out, which are rounded up."""
    first: int | None = None
    """The first step's peak, which includes one-time work."""
    note: str = ""

    @property
    def pixels(self) -> int:
        """Of a frame."""
        return self.height * self.width

    @property
    def measured_peak(self) -> int:
        """The peak of a row that has one."""
        if self.peak is None:
            raise ValueError(f"{label(self)} has no peak: {self.note}")
        return self.peak


AXES = {"steps": "time step", "layers": "layer", "batch": "sequence", "pixels": "pixel"}
"""Settings along which rows may be compared, and their units."""

SETTING = ("model", "preset", "schedule", "precision", "patch", "layers", "batch", "steps", "pixels", "how")


def label(row: Row, axis: str = "") -> str:
    """Names of the row's settings, except the one on the axis."""
    layers = f"{row.layers} layers" if row.layers and axis != "layers" else ""
    patch = "" if row.preset else f"patch {row.patch}"
    return ", ".join(part for part in (row.model, row.preset, layers, patch, row.schedule) if part)


def beyond_model(row: Row) -> int:
    """The peak without parameters, gradients and Adam's state."""
    assert row.activations is not None and row.transient is not None
    return row.activations + row.transient


def lines_over(axis: str, rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Measured rows that differ only along the axis, in its order, two or more per line."""
    families: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.peak is not None:
            setting = tuple(getattr(row, name) for name in SETTING if name != axis)
            families.setdefault(setting, []).append(row)
    for family in families.values():
        line = sorted(family, key=lambda row: getattr(row, axis) or 0)
        if getattr(line[0], axis) != getattr(line[-1], axis):
            yield line
