"""The version, which is that of the git tag that the installed package was built from."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("revflow")
except PackageNotFoundError:  # a checkout on the path, which has not been installed
    __version__ = "0+unknown"
