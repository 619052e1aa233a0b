"""The junctions of a synthetic city, and the streets between them."""

import numpy as np

from crevnet.data.made.districts import Districts

_BLOCK = 4.0  # distance of two junctions in the center, in pixels


def draw_streets(districts: Districts, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Junctions, (N, 2), and the streets between them, (S, 2) pairs of junctions, which connect all of them."""
    junctions = _junctions(districts, rng)
    return _largest_component(junctions, _streets(junctions, rng))


def _junctions(districts: Districts, rng: np.random.Generator) -> np.ndarray:
    extent = districts.extent
    half = int(extent.sum() / _BLOCK / 2) // 4 * 4
    index = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    angle = rng.uniform(0.1, 0.4) * np.pi
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = extent / 2 + _BLOCK * index @ rotation
    # Waves of low frequency bend the lattice, so that districts differ in direction and through roads curve.
    for wavelength in rng.uniform(60, 180, 4):
        direction, shift = rng.normal(size=(2, 2))
        phase = rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * points @ (direction / np.linalg.norm(direction)) / wavelength + phase)
        points = points + 0.06 * wavelength * wave[:, None] * shift / np.linalg.norm(shift)
    # Every junction in the center, every second one in the suburbs, every fourth outside, in both directions.
    noise = rng.normal(0, 0.06, len(points))
    urbanity = districts.urbanity(points) + noise
    level = np.where(urbanity > 0.55, 1, np.where(urbanity > 0.12, 2, 4))
    kept = (index % level[:, None] == 0).all(axis=1)
    points = points[kept] + rng.normal(0, 0.13 * _BLOCK, (kept.sum(), 2)) * level[kept, None]
    inside: np.ndarray = points[((points >= 1) & (points <= extent - 2)).all(axis=1)]
    return inside


def _streets(junctions: np.ndarray, rng: np.random.Generator, neighbors: int = 16) -> np.ndarray:
    """The Gabriel graph of the junctions with some streets removed at random, (S, 2) pairs of junctions."""
    count = min(neighbors, len(junctions) - 1)
    nearest = np.empty((len(junctions), count), dtype=np.int64)
    squares = np.empty((len(junctions), count))
    for block in np.array_split(np.arange(len(junctions)), max(1, len(junctions) // 256)):
        square = ((junctions[block, None] - junctions) ** 2).sum(axis=-1)
        order = np.argpartition(square, count, axis=1)[:, : count + 1]
        order = np.take_along_axis(order, np.take_along_axis(square, order, axis=1).argsort(axis=1), axis=1)[:, 1:]
        nearest[block] = order
        squares[block] = np.take_along_axis(square, order, axis=1)
    # A third point k in the circle over ij is nearer to i than j is, so searching i's neighbors is sufficient.
    between = ((junctions[nearest][:, :, None] - junctions[nearest][:, None]) ** 2).sum(axis=-1)  # (N, j, k)
    inside = squares[:, None, :] + between < squares[:, :, None] * (1 - 1e-9)
    joined = ~inside.any(axis=2)
    pairs = np.stack([np.repeat(np.arange(len(junctions)), joined.sum(axis=1)), nearest[joined]], axis=1)
    streets: np.ndarray = np.unique(np.sort(pairs, axis=1), axis=0)
    return streets[rng.uniform(size=len(streets)) > 0.12]


def _largest_component(junctions: np.ndarray, streets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    component = np.arange(len(junctions))
    while True:
        lowest = component.copy()
        np.minimum.at(lowest, streets[:, 0], component[streets[:, 1]])
        np.minimum.at(lowest, streets[:, 1], component[streets[:, 0]])
        if (lowest == component).all():
            break
        component = lowest
    kept = component == np.bincount(component).argmax()
    renumbered = np.cumsum(kept) - 1
    return junctions[kept], renumbered[streets[kept[streets[:, 0]]]]
