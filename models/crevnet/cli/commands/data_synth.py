"""Write a synthetic city, in exactly Traffic4cast's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crevnet.cli.command_parser import CommandParser
from crevnet.cli.console import console, progress_bar
from crevnet.data.made.synthetic import SyntheticCity
from crevnet.machine.files import quoted


def add_options(parser: CommandParser) -> None:
    parser.add_option("root", type=Path, help="Folder that receives the city's folder")
    parser.add_class_arguments(SyntheticCity, "city")
    parser.name_section("city", "City")
    parser.list_in_help(*(f"city.{name}" for name in SyntheticCity.__dataclass_fields__))


def run(options: Any) -> None:
    from crevnet.data.made.synthetic import write_city

    city, root = options.city, options.root
    days = city.training_days + city.validation_days
    with progress_bar(f"{city.name}: {days} days of {city.height} x {city.width}") as progress:
        paths = write_city(city, root, progress)
    console.print(f"wrote {len(paths)} days to {root / city.name} (next: crevnet fit --data.root {quoted(root)})")
