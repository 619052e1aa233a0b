"""The synthetic city of stages training and loading."""

from __future__ import annotations

from pathlib import Path

from crevnet.data.made.synthetic import SyntheticCity, write_city
from gpu_stages.stage import Setup


def city(setup: Setup) -> Path:
    """A folder with one day of full-resolution frames, which is written once."""
    height, width = setup.frame
    root = setup.work / "city"
    write_city(SyntheticCity(height=height, width=width, training_days=1, validation_days=0), root)
    return root
