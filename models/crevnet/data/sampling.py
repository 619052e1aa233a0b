"""The order of the windows and their distribution to processes: a new order per epoch, and the position of a resumed run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from math import ceil
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from crevnet.data.errors import DataError
from crevnet.machine.errors import SettingsError
from crevnet.machine.processes import place

try:
    import resource
except ImportError:  # not on Unix
    resource = None  # type: ignore[assignment]

_FILES_OF_A_WORKER = 26
"""Files that the training process has open for each worker: pipes, and one for each tensor of two batches.

It covers the workers for training and those for validation.
"""
_FILES_OF_ITS_OWN = 64  # open days, logs, checkpoints


class EpochShuffle(Sampler[int]):
    """A random order of `count` windows for each epoch. It depends only on the seed and the epoch, so a resumed run repeats it.

    With `variants` of each window, such as mirror images, one variant is drawn per window. An epoch then has `count` of the
    items 0 to variants * count - 1; item `n * count + i` is variant `n` of window `i`.
    """

    def __init__(self, count: int, seed: int, variants: int = 1) -> None:
        self._count, self._seed, self._variants, self._epoch = count, seed, variants, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch; Lightning calls this at the start of each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(self._count, generator=generator)
        variants = torch.randint(self._variants, (self._count,), generator=generator)
        return iter((order + self._count * variants).tolist())

    def __len__(self) -> int:
        return self._count


class Part(NamedTuple):
    """One process's part of a batch that several processes share."""

    share: float
    """Weight of the mean over its windows in the mean of all processes' means: 1 if all have the same number of windows."""
    windows: int
    """Number of windows in the whole batch, over all processes."""


class LostBatch(NamedTuple):
    """The error that a worker sends instead of a batch, if it could not send the batch."""

    error: str


class SharedBatchSampler(BatchSampler):
    """This process's part of each batch, without the first `skip` batches.

    A batch has `batch_size` windows for each process, which are dealt to the processes in turn. N processes therefore have the
    batches of one process with N times the batch size. All processes have the same number of batches. The last batch may be
    smaller; a process without a window then repeats another's, with a share of 0.
    """

    skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        rank, processes = place()
        together = BatchSampler(self.sampler, self.batch_size * processes, drop_last=False)
        for batch in islice(together, self.skip, None):
            yield batch[rank::processes] or batch[:1]

    def __len__(self) -> int:
        return ceil(self._count / (self.batch_size * place()[1]))

    def part(self, number: int) -> Part:
        """This process's part of batch `number`, 0 being the epoch's first."""
        rank, processes = place()
        whole = self.batch_size * processes
        windows = min(whole, self._count - number * whole)
        return Part(len(range(rank, windows, processes)) * processes / windows, windows)

    @property
    def sizes(self) -> list[int]:
        """The numbers of windows in all processes' batches, without repetition; those of the last batch of an epoch come last."""
        _, processes = place()
        whole = self.batch_size * processes
        full, left = divmod(self._count, whole)
        last = [len(range(rank, left, processes)) or 1 for rank in range(processes)] if left else []
        return list(dict.fromkeys([self.batch_size] * (full > 0) + last))

    @property
    def _count(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class WindowLoader(DataLoader[dict[str, Any]]):
    """A loader of a `SharedBatchSampler`'s batches, each with its `Part` as "part".

    Its state, in the form that Lightning requires, is the number of batches yielded in the epoch. After loading a state, the next
    epoch starts after those batches, without reading them. Raises DataError if a window cannot be read, also from a worker.
    """

    _used = 0
    _skip = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        return self._batches(skip)

    def _batches(self, skip: int) -> Iterator[dict[str, Any]]:
        # A generator starts with the first batch: Lightning sets the epoch only after it has called iter().
        self._shared.skip = self._used = skip
        try:
            for batch in self._begun():
                if isinstance(batch, LostBatch):
                    raise RuntimeError(batch.error)
                batch["part"] = self._shared.part(self._used)
                self._used += 1
                yield batch
        except Exception as error:
            self._end_workers()
            if not isinstance(error, DataError):
                raise
            # A worker's message ends with a traceback, whose last line is the error.
            kind = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(kind)) from error

    @property
    def sizes(self) -> list[int]:
        """The numbers of windows in all processes' batches."""
        return self._shared.sizes

    @property
    def _shared(self) -> SharedBatchSampler:
        assert isinstance(self.batch_sampler, SharedBatchSampler)
        return self.batch_sampler

    def _begun(self) -> Iterator[dict[str, Any]]:
        try:
            return super().__iter__()
        except OSError as error:  # from the semaphores that workers share
            if error.errno == errno.ENOSPC:
                raise RuntimeError(
                    f"no shared memory for --data.workers {self.num_workers} ({error.strerror})"
                ) from error
            raise

    def _end_workers(self) -> None:
        """End the workers immediately; Python's garbage collection would wait five seconds for each."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None

    def state_dict(self) -> dict[str, int]:
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["used"]


def window_loader(
    windows: Dataset[dict[str, Any]], batch_size: int, workers: int, sampler: Sampler[int] | None = None
) -> WindowLoader:
    """A loader of batches with `batch_size` windows per process, in the sampler's order, or in the windows' order without one."""
    if workers > 0:
        _allow_open_files(workers)
    order = SequentialSampler(windows) if sampler is None else sampler  # type: ignore[arg-type]
    batches = SharedBatchSampler(order, batch_size, drop_last=False)
    own = torch.Generator()  # otherwise each epoch would draw from the generator of the model's dropout
    return WindowLoader(
        windows,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=own,
        worker_init_fn=_report_lost_batches,
    )


def _report_lost_batches(worker: int) -> None:
    """In a worker, pass on the error of a batch that could not be sent, for lack of shared memory or open files.

    The worker's queue would only print the error and drop the batch, for which the training process would wait forever.
    """

    def hand_on(queue: Queue[Any], error: Exception, lost: tuple[int, object]) -> None:
        queue.put((lost[0], LostBatch(f"{type(error).__name__}: {error}")))

    Queue._on_queue_feeder_error = hand_on  # type: ignore[attr-defined]


def _allow_open_files(workers: int) -> None:
    """Raise this process's limit on open files to the system's maximum. SettingsError if that is too low for the workers.

    Processes that run out of open files would wait for each other forever.
    """
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS accepts no infinite limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + _FILES_OF_A_WORKER * workers + _FILES_OF_ITS_OWN
    if needed > limit != resource.RLIM_INFINITY:
        raise SettingsError(
            f"--data.workers {workers} requires {needed} open files, but the system allows {limit}: raise the limit "
            "(ulimit -Hn), or lower --data.workers"
        )
