"""Which windows come when, and to which process: another order each epoch, and the place in it where a resumed run goes on."""

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
from torch._utils import ExceptionWrapper
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from crevnet.data.errors import DataError
from crevnet.machine.errors import SettingsError
from crevnet.machine.processes import place

try:
    import resource
except ImportError:  # not on Unix
    resource = None  # type: ignore[assignment]

_FILES_OF_A_WORKER = 26
"""Open files that a worker takes in the process that trains: a pipe's, and one for each tensor of two batches; for training
and for validation."""
_FILES_OF_ITS_OWN = 64  # days that are kept open, logs, checkpoints


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


class Part(NamedTuple):
    """What one process has of a batch that several share."""

    share: float
    """What the mean over its windows counts in the mean of all processes' means: 1 where all have as many windows."""
    windows: int
    """Of the whole batch, in all processes."""


class SharedBatchSampler(BatchSampler):
    """This process's part of each batch, of which the first `skip` are passed over.

    A batch holds `batch_size` windows for each process, and these take turns in choosing: so the batches are those of one
    process with that many times the batch size. All processes have as many batches. The last one may hold fewer windows,
    and then a process that gets none takes one of the others', with a share of 0.
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
        """What this process has of a batch, 0 being the epoch's first."""
        rank, processes = place()
        whole = self.batch_size * processes
        windows = min(whole, self._count - number * whole)
        return Part(len(range(rank, windows, processes)) * processes / windows, windows)

    @property
    def _count(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class WindowLoader(DataLoader[dict[str, Any]]):
    """A loader of a `SharedBatchSampler`'s batches, whose state is how many of the epoch it has handed out, as Lightning asks of
    a stateful one. Each batch has its `Part`, as "part".

    With a state loaded, its next epoch begins behind those batches, and reads none of them.
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
            for batch in self._begun():
                batch["part"] = self.batch_sampler.part(self._used)
                self._used += 1
                yield batch
        except Exception as error:
            self._end_workers()
            if not isinstance(error, DataError):
                raise
            # A worker's message ends with its traceback, and that with its error.
            kind = f"{type(error).__module__}.{type(error).__qualname__}: "
            raise DataError(str(error).strip().splitlines()[-1].removeprefix(kind)) from error

    def _begun(self) -> Iterator[dict[str, Any]]:
        try:
            return super().__iter__()
        except OSError as error:  # of the semaphores that are shared with workers
            if error.errno == errno.ENOSPC:
                raise RuntimeError(
                    f"no shared memory for --data.workers {self.num_workers} ({error.strerror})"
                ) from error
            raise

    def _end_workers(self) -> None:
        """At once: Python, where it collects them as garbage, waits five seconds for each."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def state_dict(self) -> dict[str, int]:
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["used"]


def window_loader(
    windows: Dataset[dict[str, Any]], batch_size: int, workers: int, sampler: Sampler[int] | None = None
) -> WindowLoader:
    """Batches of windows, `batch_size` for each process, in the sampler's order or, without one, in theirs."""
    if workers > 0:
        _allow_open_files(workers)
    order = SequentialSampler(windows) if sampler is None else sampler
    batches = SharedBatchSampler(order, batch_size, drop_last=False)
    own = torch.Generator()  # else each epoch would draw from the generator that a model's dropout draws from
    return WindowLoader(
        windows,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=own,
        worker_init_fn=_report_lost_batches,
    )


def _report_lost_batches(worker: int) -> None:
    """In a worker: hand on the error of a batch that could not be sent, for want of shared memory or open files. Its queue
    would print the error and drop the batch, which the process that trains would wait for without end."""

    def hand_on(queue: Queue[Any], error: Exception, lost: tuple[int, object]) -> None:
        where = f"in DataLoader worker process {worker}"
        queue.put((lost[0], ExceptionWrapper((type(error), error, error.__traceback__), where)))

    Queue._on_queue_feeder_error = hand_on


def _allow_open_files(workers: int) -> None:
    """Raise this process's limit as far as the system lets it. SettingsError where that is too low for the workers, since
    processes that run out of open files wait for each other without end."""
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS takes no limit that is infinite
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + _FILES_OF_A_WORKER * workers + _FILES_OF_ITS_OWN
    if needed > limit != resource.RLIM_INFINITY:
        raise SettingsError(
            f"--data.workers {workers} takes {needed} open files, and the system allows {limit}: raise the limit "
            "(ulimit -Hn), or lower --data.workers"
        )
