"""The districts of a synthetic city, which determine how dense its streets are."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Districts:
    """The extent of a city in pixels, (2,), its center and sub-centers, (K, 2), and their radii, (K,)."""

    extent: np.ndarray
    centers: np.ndarray
    radii: np.ndarray

    def urbanity(self, points: np.ndarray) -> np.ndarray:
        """For each point, a value in [0, 1]: 1 in the center of a district, 0 far from all."""
        distances = np.linalg.norm(points[:, None] - self.centers, axis=-1)
        urbanity: np.ndarray = np.exp(-((distances / self.radii) ** 2) / 2).max(axis=1)
        return urbanity


def draw_districts(extent: np.ndarray, rng: np.random.Generator) -> Districts:
    """The city's center, then its sub-centers, far from each other."""
    size = float(np.sqrt(extent.prod()))
    centers = [extent * rng.uniform(0.44, 0.56, 2)]
    radii = [max(0.2 * size, 24.0)]
    for _ in range(int(extent.prod() / 20_000)):
        candidates = extent * rng.uniform(0.1, 0.9, (8, 2))
        distances = np.linalg.norm(candidates[:, None] - np.array(centers), axis=-1).min(axis=1)
        centers.append(candidates[distances.argmax()])
        radii.append(size * rng.uniform(0.04, 0.09))
    return Districts(extent, np.array(centers), np.array(radii))
