"""Stage tradeoff: memory against time of the networks of bench/budget.py. Compiled methods run last, as they take longest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

import budget
from gpu_stages.jobs import Job, each
from gpu_stages.stage import Row, Rows, Setup
from kit import networks, time_row
from kit.methods import checkpointed, compiled
from kit.networks import Network
from kit.precisions import set_precision

PARTS = 4
"""Number of steps of revflow's budgets from "min" to "max"."""


def rows(setup: Setup) -> Rows:
    device, rounds = torch.device(setup.device), 2 if setup.toy else 5
    torch.manual_seed(0)
    set_precision("tf32")
    made = sizes(setup, device)
    jobs = [Job({"network": name}, partial(of_budgets, make, rounds, device)) for name, make in made.items()]
    if not setup.toy:  # compilers take minutes on a CPU
        jobs += [
            Job({"network": name, "method": "compiled"}, partial(of_compiled, make, rounds, device), may_fail=True)
            for name, make in made.items()
        ]
    return each(jobs)


def sizes(setup: Setup, device: torch.device) -> dict[str, Callable[[], Network]]:
    if setup.toy:
        return {
            "convolutions": partial(networks.convolutions, 4, 4, blocks=4, device=device),
            "transformer": partial(networks.transformer, 4, 8, layers=2, device=device),
            "autoencoder": partial(networks.autoencoder, 4, 16, blocks=1, device=device),
        }
    return {
        "convolutions": partial(networks.convolutions, 16, 56, device=device),
        "transformer": partial(networks.transformer, 16, 1024, device=device),
        "autoencoder": partial(networks.autoencoder, 16, 432, device=device),
    }


def of_budgets(make: Callable[[], Network], rounds: int, device: torch.device) -> Iterable[Row]:
    return flat(budget.compare(make, rounds, device, parts=PARTS))


def of_compiled(make: Callable[[], Network], rounds: int, device: torch.device) -> Iterable[Row]:
    return flat(budget.points_only(make, rounds, device, [checkpointed(1), compiled()]))


def flat(found: list[time_row.Row]) -> Iterable[Row]:
    plain = found[0].figures
    for row in found:
        figures = row.figures
        yield {
            "network": row.network,
            "size": row.size,
            "method": row.method,
            "setting": row.setting,
            "peak_bytes": row.peak,
            "peak_over_plain": figures.peak / plain.peak if figures and plain else None,
            "time_over_plain": row.time_ratio,
            "standard_error": row.error,
            "seconds_per_step": row.seconds,
            "note": row.note,
        }
