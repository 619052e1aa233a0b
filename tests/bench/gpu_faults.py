"""Stages of bench/gpu.py that go wrong, each in its way."""

import os
import signal
import subprocess
import sys
import time

import torch

from gpu_stages.jobs import Job, each
from gpu_stages.stage import SkipError


def stays(setup):
    """Longer than its limit, with a child."""
    yield {"number": 1}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (setup.out / "child").write_text(str(child.pid))
    yield {"number": 2}
    time.sleep(600)


def raises(setup):
    yield {"number": 1}
    raise ValueError("planted\non two lines")


def runs_out(setup):
    yield {"number": 1}
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def finds_no_engine(setup):
    """cuDNN's, where each engine's workspace was refused."""
    yield {"number": 1}
    raise RuntimeError("GET was unable to find an engine to execute this computation")


def dies(setup):
    yield {"number": 1}
    sys.stdout.write("last words\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def skips(setup):
    raise SkipError("there is nothing to do")
    yield


def leaves_nothing(setup):
    return iter(())


def job_fails(setup):
    def fail():
        raise ValueError("planted")

    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory")

    jobs = [Job({"name": "first"}, fail), Job({"name": "second"}, run_out), Job({"name": "third"}, fail, may_fail=True)]
    return each([*jobs, Job({"name": "fourth"}, lambda: [{"name": "fourth", "note": ""}])])


def works(setup):
    yield {"name": "a | b", "peak_bytes": 2**20, "share": float("nan"), "is_enough": True, "none": None}
