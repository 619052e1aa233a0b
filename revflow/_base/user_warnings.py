"""Warnings that point to a line of the user's code."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that led here: the innermost one outside of revflow and PyTorch."""
    frame = next(filter(is_users, _frames()), None)
    if frame is None:
        warnings.warn(message, category, stacklevel=2)
        return
    module, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def _frames() -> Iterator[FrameType]:
    """The frames of this thread, then those of threads that wait for a backward pass, each from the innermost one outwards.

    On a GPU, autograd runs a backward pass in a thread of its own, whose stack does not lead to the line that began the pass.
    """
    waiting = [f for f in sys._current_frames().values() if f.f_code.co_name == "_engine_run_backward"]
    for frame in (inspect.currentframe(), *waiting):
        while frame is not None:
            yield frame
            frame = frame.f_back


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs code outside of revflow and PyTorch."""
    return not frame.f_code.co_filename.startswith(_LIBRARIES)
