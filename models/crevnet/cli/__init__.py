"""The command line. `commands` has one file per command; all others are what commands share.

Help and errors of options appear without PyTorch, whose import takes seconds: a command imports what it computes with in `run`.
"""

from crevnet.cli.command_line import main as main
