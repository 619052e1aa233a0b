"""Two small cities in the files of Traffic4cast 2021."""

from pathlib import Path

import h5py
import numpy as np

SLOTS, HEIGHT, WIDTH = 30, 21, 14


def frames(seed: int) -> np.ndarray:
    """(SLOTS, HEIGHT, WIDTH, 8) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (SLOTS, HEIGHT, WIDTH, 8), dtype=np.uint8)


def static(seed: int) -> np.ndarray:
    """(9, HEIGHT, WIDTH) uint8: gray roads, and whether they lead on."""
    rng = np.random.default_rng(seed)
    leads_on = 255 * rng.integers(0, 2, (8, HEIGHT, WIDTH), dtype=np.uint8)
    return np.concatenate([rng.integers(0, 256, (1, HEIGHT, WIDTH), dtype=np.uint8), leads_on])


def write_day(root: Path, array: np.ndarray, city: str, date: str, split: str = "training") -> Path:
    path = root / city / split / f"{date}_{city}_8ch.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["array"] = array
    return path


def write_cities(root: Path) -> Path:
    """ANTWERP's 1 to 4 January 2019, frames of seeds 1 to 4, and BERLIN's first two days, 11 and 12; static files 1 and 2."""
    for city, first, days in (("ANTWERP", 1, 4), ("BERLIN", 11, 2)):
        for day in range(days):
            write_day(root, frames(first + day), city, f"2019-01-{day + 1:02d}")
    for city, seed in (("ANTWERP", 1), ("BERLIN", 2)):
        with h5py.File(root / city / f"{city}_static.h5", "w") as file:
            file["array"] = static(seed)
    return root
