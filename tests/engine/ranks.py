"""Two processes that talk over gloo and run the same function, so that a failure in one of them fails the test.

Starting them takes seconds, so they serve one test after another, and are started anew only after a failure: then they may
no longer agree on which collective comes next.
"""

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import revflow

WORLD = 2
TIMEOUT = 60.0
"""Seconds for one case: a hang is a failure."""
GRACE = 3.0
"""Seconds for a rank to fail too, once the other has: it may wait for that one in vain."""


class Ranks:
    """`run` calls a function of an importable module in every process, with the rank as its first argument."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., None], *arguments: object) -> None:
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        failures = self._failures()
        if failures:
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)), pytrace=False)

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        self._starts += 1
        meeting = (self._folder / f"meeting{self._starts}").as_uri()
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _failures(self) -> dict[int, str]:
        failures = {}
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + TIMEOUT
        while ranks:
            ready = wait([*ranks], max(0.0, deadline - time.monotonic()))
            if not ready:
                return failures or {rank: f"no answer within {TIMEOUT:.0f} s" for rank in ranks.values()}
            for pipe in ready:
                rank = ranks.pop(pipe)
                try:
                    failure = pipe.recv()
                except EOFError:
                    failure = "the process has died"
                if failure is not None:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE)
        return failures


def _serve(rank: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module="revflow")
    warnings.filterwarnings("error", category=revflow.ReconstructionWarning)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        try:
            case(rank, *arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
