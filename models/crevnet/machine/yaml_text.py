"""YAML from untrusted files: small, shallow, and checked before any value is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from crevnet.machine.files import read_text

MAX_DEPTH = 50
MAX_VALUES = 10_000
"""Maximum number of values, with each alias replaced by the values that it refers to."""


def load_yaml(path: Path) -> Any:
    """A file's values. Raises OSError, ValueError and yaml.YAMLError."""
    text = read_text(path)
    check_yaml(text)
    return yaml.safe_load(text)


def check_yaml(text: str) -> None:
    """Raise yaml.YAMLError for text with more than MAX_VALUES values or MAX_DEPTH levels.

    Aliases of aliases can grow tenfold with every line, and many levels overflow the stack of the code that walks them.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # each with its anchor, and the values before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} refers to no value before it: write the values out")
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
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values, including those of aliases: write fewer")
        if len(open_nodes) > MAX_DEPTH:
            raise yaml.YAMLError(f"it has more than {MAX_DEPTH} levels: write fewer")
