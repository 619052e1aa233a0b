"""The error of everything that reads or writes data."""


class DataError(Exception):
    """A file or folder that cannot be used; one line that names it, what it was, what was expected and what to do."""


class UndamagedError(DataError):
    """A file that cannot be read now, but is not damaged: it is never left out as a damaged one is."""


def refuse_undamaged(what: str, error: BaseException) -> None:
    """UndamagedError, which begins with `what`, if h5py could not read a file because it is locked or the machine lacks
    something."""
    text = " ".join(str(error).split())
    for sign, problem, remedy in _UNDAMAGED:
        if sign in text:
            raise UndamagedError(f"{what} {problem} ({text}): {remedy}") from error


_UNDAMAGED = (
    (
        "unable to lock file",
        "is locked",
        "wait until the process that writes to it has ended, or, if none does, set HDF5_USE_FILE_LOCKING=FALSE",
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
"""What h5py's error holds, the problem and the remedy."""
