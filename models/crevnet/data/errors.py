"""The error of everything that reads or writes data."""


class DataError(Exception):
    """A file or folder that cannot be used; one line that names it, what it was, what was expected and what to do."""
