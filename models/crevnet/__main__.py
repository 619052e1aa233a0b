"""The command `crevnet`, or `python -m crevnet`: the command line, or one line on what to install for it."""

import sys


def main() -> None:
    try:
        from crevnet.cli import main as command_line
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("crevnet", "revflow"):
            raise
        sys.stderr.write(f"crevnet: there is no {error.name} here, only the engine: pip install 'revflow[crevnet]'\n")
        sys.exit(2)
    command_line()


if __name__ == "__main__":
    main()
