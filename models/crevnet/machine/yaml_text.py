"""YAML from files that others may have written: small, shallow, and no larger than it looks before any of it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from crevnet.machine.files import read_text

MAX_DEPTH = 50
MAX_VALUES = 10_000
"""Once each alias stands for all that it names."""


def load_yaml(path: Path) -> Any:
    """A file's values. Raises OSError, ValueError and yaml.YAMLError."""
    text = read_text(path)
    check_yaml(text)
    return yaml.safe_load(text)


def check_yaml(text: str) -> None:
    """Raises yaml.YAMLError for text that would become more than MAX_VALUES values, or more than MAX_DEPTH levels of them.

    Aliases of aliases grow tenfold with every line, and whoever builds or walks many levels runs out of its stack.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # each with its anchor, and the values before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} names nothing before it: write the values out")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values, aliases counted in: write fewer")
        if len(open_nodes) > MAX_DEPTH:
            raise yaml.YAMLError(f"it has more than {MAX_DEPTH} levels: write fewer")
