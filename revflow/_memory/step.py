"""A step without data: its errors point to the user's code, and it leaves everything outside of the step unchanged."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from revflow._base.torch_private import fake_tensor
from revflow._base.user_warnings import is_users
from revflow._memory.dataless import DatalessMode
from revflow._memory.functions import fake_tensors_like_others
from revflow._memory.snapshot import unchanged

_UNKNOWN = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
_NO_ARRAY = ".numpy() is not supported"


@contextmanager
def dataless() -> Iterator[DatalessMode]:
    """Run the code in this context without data."""
    with unchanged(), fake_tensors_like_others(), DatalessMode() as mode:
        try:
            yield mode
        except RuntimeError as error:
            if not isinstance(error, _UNKNOWN) and _NO_ARRAY not in str(error):
                raise
            raise RuntimeError(_message(error)) from error


def _message(error: RuntimeError) -> str:
    file, line, code = _place(error.__traceback__)
    if isinstance(error, fake_tensor.DynamicOutputShapeException):
        reason = "the size of a result depends on the values of a tensor"
        remedy = "use an operation whose result has a fixed size, such as torch.where instead of an index by a mask"
    elif isinstance(error, fake_tensor.DataDependentOutputException):
        reason = "the step reads an integer or a boolean from a tensor, for example for a branch, a size or a loop"
        remedy = "leave this line out of the step, or replace the value by a Python number"
    else:
        reason = "the step converts a tensor to a NumPy array"
        remedy = "leave this line out of the step"
    return (
        f"the step's memory cannot be predicted, because of {file}, line {line}: `{code}`. There, {reason}. The prediction runs "
        f"the step on tensors without data, so this value is unknown. To predict the memory, {remedy}"
    )


def _place(trace: TracebackType | None) -> tuple[str, int, str]:
    """The file, the number and the text of the innermost line outside of PyTorch, revflow and Python's own modules."""
    lines = list(traceback.walk_tb(trace))
    users = [(frame, line) for frame, line in lines if is_users(frame) and not _is_pythons(frame)]
    frame, line = (users or lines)[-1]
    file = frame.f_code.co_filename
    return file, line, linecache.getline(file, line).strip()


def _is_pythons(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] in sys.stdlib_module_names
