"""What ends a command before its time: one line on stderr, and an exit status."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from crevnet.data.errors import DataError
from crevnet.machine.errors import SettingsError
from crevnet.machine.processes import is_first, is_first_to_fail


@contextmanager
def exit_status() -> Iterator[None]:
    """End the process with one line for each foreseen error. All others pass, with their tracebacks."""
    warnings.showwarning = _show_warning
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (DataError, SettingsError) as error:
        _fail(str(error), 2)
    except Exception as error:
        found = _foreseen(error)
        if found is None:
            raise
        _fail(*found)


def _foreseen(error: Exception) -> tuple[str, int] | None:
    """The line and the exit status of an error that `run` has raised."""
    from crevnet.machine.shortages import lack_of
    from crevnet.training.failures import TrainingError

    if isinstance(error, TrainingError):
        return str(error), error.exit_status
    if isinstance(error, OverflowError):  # of the grid of exact arithmetic
        return f"{error}; --model.exact_bits sets a model's bits", 2
    if isinstance(error, UnicodeEncodeError):  # of TensorBoard, for example
        return f"{error.object!a} is not a name in UTF-8, and not every library can use it: rename it", 2
    if isinstance(error, (MemoryError, OSError, RuntimeError)):
        lack = lack_of(error)
        if lack is not None:
            return lack, 1
        if isinstance(error, OSError):
            return str(error), 2
    return None


def _fail(message: str, status: int) -> NoReturn:
    """Print the line and exit. If several processes train together, only the first that fails prints its line."""
    _on_stderr(not is_first_to_fail()).print(f"[red]crevnet:[/] {escape(message)}")
    sys.exit(status)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    from crevnet.training.failures import warned

    _on_stderr(not is_first()).print(f"[yellow]warning:[/] {escape(warned(message))}")


def _on_stderr(quiet: bool) -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
