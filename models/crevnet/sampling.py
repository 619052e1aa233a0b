"""Which windows come when: another order each epoch, and the place in it from which a resumed run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from crevnet.data.errors import DataError


class EpochShuffle(Sampler[int]):
    """Another order of `count` windows each epoch, the same in a resumed run: it follows from the seed and the epoch.

    With `variants` of each window, such as mirror images, one of them is drawn: an epoch holds `count` of the items 0 to
    variants * count - 1, item `n * count + i` being variant `n` of window `i`.
    """

    def __init__(self, count: int, seed: int, variants: int = 1) -> None:
        self._count, self._seed, self._variants, self._epoch = count, seed, variants, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(self._count, generator=generator)
        variants = torch.randint(self._variants, (self._count,), generator=generator)
        return iter((order + self._count * variants).tolist())

    def __len__(self) -> int:
        return self._count


class ResumableBatchSampler(BatchSampler):
    """Batches of windows, of which the first `skip` are passed over."""

    skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        return islice(super().__iter__(), self.skip, None)


class WindowLoader(DataLoader[dict[str, Any]]):
    """A loader whose state is how many batches of the epoch it has handed out, as Lightning asks of a stateful one.

    With a `ResumableBatchSampler` and a state loaded, its next epoch begins behind those batches, and reads none of them.
    DataError, in one line from a worker too, where a window cannot be read.
    """

    _used = 0
    _skip = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        return self._batches(skip)

    def _batches(self, skip: int) -> Iterator[dict[str, Any]]:
        # Begins with the first batch that is asked for: Lightning says which epoch it is after it has called iter().
        self.batch_sampler.skip = self._used = skip
        try:
            for batch in super().__iter__():
                self._used += 1
                yield batch
        except DataError as error:  # a worker's message ends with its traceback, and that with its error
            kind = f"{DataError.__module__}.{DataError.__qualname__}: "
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(kind)) from error

    def state_dict(self) -> dict[str, int]:
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["used"]


def window_loader(
    windows: Dataset[dict[str, Any]], batch_size: int, workers: int, sampler: Sampler[int] | None = None
) -> WindowLoader:
    """Batches of windows, in the sampler's order or, without one, in theirs."""
    order = SequentialSampler(windows) if sampler is None else sampler
    batches = ResumableBatchSampler(order, batch_size, drop_last=False)
    own = torch.Generator()  # else each epoch would draw from the generator that a model's dropout draws from
    return WindowLoader(
        windows, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0, generator=own
    )
