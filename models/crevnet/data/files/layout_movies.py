"""The user's own videos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crevnet.data.errors import DataError
from crevnet.data.files.layouts import COUNTS, Layout
from crevnet.data.files.protocol import HeadingOrder
from crevnet.machine.files import quoted


class Movies(Layout):
    """The user's own videos, (frames, H, W, C), of any lengths: no cities, dates, headings or time of day."""

    files = "<root>/{split}/*.h5, or <root>/*.h5 for all splits"
    dtypes = (*COUNTS, "float16", "float32", "float64")
    dated = False
    has_roads = False
    noun = "video"
    axes = "(frames, H, W, C), channels last"
    dtype_remedy = "convert it to uint8, or to floats in [0, 1]"
    made_by = "make videos with `crevnet data moving-mnist`"

    def find(self, root: Path, split: str) -> dict[str, list[Path]]:
        folder = root / split if (root / split).is_dir() else root
        paths = sorted(filter(self.holds, folder.iterdir()))
        return {root.absolute().name: paths} if paths else {}

    def date(self, path: Path) -> str:
        return path.stem

    def lead(self, frames: int) -> str:
        return f"{frames:+d}"

    def time(self, slot: int) -> str:
        return f"frame {slot}"

    def named(self, city: str, date: str) -> str:
        return date

    def shape_remedy(self, shape: tuple[int, ...]) -> str:
        return "add a channel axis: array[..., None]" if len(shape) == 3 and 0 not in shape else "leave it out"

    def channels_remedy(self, shape: tuple[int, ...]) -> str:
        return (
            f"its shape {shape} is read as {self.axes}; move the channel axis last, or set --model.channels {shape[3]}"
        )

    def parting_remedy(self, root: Path, splits: tuple[str, str]) -> str:
        if root.absolute().name in splits:
            return f"did you mean --data.root {quoted(root.parent)}?"
        folders = " and ".join(str(root / split) for split in splits)
        return f"put videos into {folders}, or split frames with --data.training_slots and --data.validation_slots"

    def value_error(self, path: Path, start: int, values: np.ndarray, largest: int) -> Exception:
        good = ((values >= 0) & (values <= largest)).all(axis=(1, 2, 3))  # False for NaN
        number = int(good.argmin())
        frame, where = values[number], f"{path}, frame {start + number}"
        if not np.isfinite(frame).all():
            return DataError(f"{where} has values that are not finite; replace them, or leave the file out")
        low, high = float(frame.min()), float(frame.max())
        if largest == 1 and low >= 0 and 2 < high <= 255:  # up to 2, values may exceed 1 by sharpening
            digits, remedy = ".3g", "divide by 255, or store uint8"
        else:
            digits, remedy = ".7g", f"scale or clip them to [0, {largest}]"
        return DataError(f"{where} has values {low:{digits}}..{high:{digits}}, expected 0..{largest}; {remedy}")

    def length_error(self, lengths: Mapping[Path, int], past: int, horizon: int) -> DataError | None:
        longest = max(lengths, key=lengths.__getitem__)
        if lengths[longest] >= past + horizon:
            return None
        return DataError(
            f"{longest}, the longest video, has {lengths[longest]} frames; expected at least {past + horizon}, "
            f"--model.past {past} + --model.horizon {horizon}: lower these, or use longer videos"
        )


def layout(heading_order: HeadingOrder) -> Movies:
    return Movies()
