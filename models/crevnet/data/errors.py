"""The errors of functions that read or write data."""


class DataError(Exception):
    """A file or folder that cannot be used. Its one line states the path, the fault, the expectation and the remedy."""


class UndamagedError(DataError):
    """A file that cannot be read now but is not damaged; unlike a damaged file, it is never skipped."""


def refuse_undamaged(what: str, error: BaseException) -> None:
    """Raise UndamagedError, beginning with `what`, if h5py failed because of a lock, open files or memory.

    Returns for all other errors.
    """
    text = " ".join(str(error).split())
    for sign, problem, remedy in _UNDAMAGED:
        if sign in text:
            raise UndamagedError(f"{what} {problem} ({text}): {remedy}") from error


_UNDAMAGED = (
    (
        "unable to lock file",
        "is locked",
        "wait until the process that writes to it ends, or, if there is none, set HDF5_USE_FILE_LOCKING=FALSE",
    ),
    (
        "Too many open files",
        "cannot be opened",
        "raise the limit (ulimit -n), or lower --data.workers",
    ),
    (
        "memory allocation failed",
        "cannot be read",
        "lower --data.batch_size or --data.workers, or increase the available memory",
    ),
)
"""A substring of h5py's error, the problem and the remedy."""
