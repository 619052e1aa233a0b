"""All measurements that need a CUDA GPU: memory, largest batches, exactness, times, a training run and its loader.

    make gpu                                          # all stages, at most nine minutes
    python bench/gpu.py --stages memory correctness   # some of them
    python bench/gpu.py --device cpu --toy --out DIR  # the same stages at toy size, without a GPU

Each stage is a process of its own with a time limit. When it ends, it leaves NAME.json, NAME.md and NAME.log in the folder of
results: its status (ok, failed, out of memory, out of time, skipped), its seconds and its rows. A stage that is stopped keeps
the rows that it has. The next stage starts in any case. summary.json and summary.md have a row per stage. The exit status is 0
if each stage is ok or skipped, else 1.

The command installs nothing: it needs PyTorch, Lightning, h5py, matplotlib, pytest and TensorBoard, and generates its data.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from gpu_stages.outcome_files import write_stage, write_summary
from gpu_stages.process import Outcome, run
from gpu_stages.stage import STAGES, Setup, Stage

RESULTS = Path(__file__).parent / "results" / "gpu"


def main() -> None:
    a = options()
    chosen = [stage for stage in STAGES if stage.name in a.stages]
    outcomes = [*run_all(chosen, a.out, a.minutes, a.device, a.toy)]
    print(f"summary: {a.out / 'summary.md'}")
    sys.exit(0 if all(outcome.is_fine for outcome in outcomes) else 1)


def options() -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        usage="python bench/gpu.py [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = f"stages to run: {', '.join(names)} (all)"
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE", help=listed)
    parser.add_argument("--minutes", type=positive, default=9.0, help="time limit of all stages together, minutes (9)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (bench/results/gpu)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device (cuda)")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to test that the stages run")
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: choose --device cpu --toy to try the stages without one")
    if a.device == "cpu" and not a.toy:
        parser.error("--device cpu: full sizes need a GPU; add --toy")
    try:
        a.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {a.out}: {error.strerror}; choose another folder")
    return a


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError(text)
    return value


def run_all(stages: Sequence[Stage], out: Path, minutes: float, device: str, toy: bool) -> Iterator[Outcome]:
    """Run one stage after the other, and write the results of each as soon as it has ended.

    The stages share the minutes in proportion to their limits. Time that a stage does not use passes to the next ones.
    """
    began, shares = time.monotonic(), [*accumulate(stage.limit for stage in stages)]
    outcomes: list[Outcome] = []
    work = Path(tempfile.mkdtemp(prefix="revflow-gpu-"))
    try:
        for stage, share in zip(stages, shares, strict=True):
            setup = Setup(device, toy, out, work, began + 60 * minutes * share / shares[-1])
            outcome = run(stage, setup)
            outcomes.append(outcome)
            write_stage(outcome, setup)
            write_summary(outcomes, setup)
            print(outcome, flush=True)
            yield outcome
    finally:
        shutil.rmtree(work, ignore_errors=True)  # gigabytes of checkpoints, which a stopped stage leaves


if __name__ == "__main__":
    main()
