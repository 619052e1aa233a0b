"""The command `crevnet`, or `python -m crevnet`. If a package is missing, it prints one line on how to install it."""

import sys


def main() -> None:
    try:
        from crevnet.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:  # commands import what they compute with when they run
        if error.name is None or error.name.partition(".")[0] in ("crevnet", "revflow"):
            raise
        sys.stderr.write(
            f"crevnet: {error.name} is not installed, only the engine is: pip install 'revflow[crevnet]'\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
