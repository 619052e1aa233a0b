"""Which streets of a synthetic city are arterials and motorways."""

import numpy as np

from crevnet.data.made.districts import Districts
from crevnet.data.made.shortest_paths import directed, exits_of, shortest_paths

LOCAL, ARTERIAL, MOTORWAY = range(3)


def road_classes(
    junctions: np.ndarray, streets: np.ndarray, districts: Districts, rng: np.random.Generator
) -> np.ndarray:
    """The road class of each street, (S,)."""
    roads = _Roads(junctions, streets)
    center, ring_radius = districts.centers[0], 1.3 * districts.radii[0]
    outside = districts.extent.max()
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    around = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    if 2.4 * ring_radius < districts.extent.min():
        ring = center + ring_radius * around
        for one, other in zip(ring, np.roll(ring, 1, axis=0), strict=True):
            roads.join(one, other, MOTORWAY)
        for direction in around[::3]:
            roads.join(center + ring_radius * direction, center + outside * direction, MOTORWAY)
    for direction in around[1::2]:
        roads.join(center, center + outside * direction, ARTERIAL)
    hubs = _hubs(junctions, districts, rng)
    for number, hub in enumerate(hubs):
        for other in np.linalg.norm(hubs - hub, axis=1).argsort()[1:4]:
            if number < other:
                roads.join(hub, hubs[other], ARTERIAL)
    return roads.road_class


class _Roads:
    """Streets that become arterials and motorways one path at a time.

    Attributes:
        road_class: (S,) int64, that of each street so far.
    """

    def __init__(self, junctions: np.ndarray, streets: np.ndarray) -> None:
        self.road_class = np.full(len(streets), LOCAL)
        self._junctions = junctions
        self._tail, head = directed(streets)
        self._cost: list[float] = np.linalg.norm(junctions[self._tail] - junctions[head], axis=1).tolist()
        self._exits = exits_of(self._tail, head)

    def join(self, one: np.ndarray, other: np.ndarray, to: int) -> None:
        """Make the streets of the cheapest path between two points roads of class `to`, or of the higher one that they have."""
        source, target = self._nearest(one), self._nearest(other)
        _, reached_by = shortest_paths(self._exits, self._cost, source, target)
        while target != source:
            edge = reached_by[target]
            if self.road_class[edge // 2] == LOCAL:
                # Existing roads are cheap, so that paths merge into trunk roads.
                self._cost[edge] = self._cost[edge ^ 1] = 0.55 * self._cost[edge]
            self.road_class[edge // 2] = max(to, self.road_class[edge // 2])
            target = self._tail[edge]

    def _nearest(self, point: np.ndarray) -> int:
        return int(((self._junctions - point) ** 2).sum(axis=1).argmin())


def _hubs(junctions: np.ndarray, districts: Districts, rng: np.random.Generator) -> np.ndarray:
    """Junctions spread over the city, (M, 2), about 2 km apart in the center and 5 km outside."""
    spacing = 20 + 30 * (1 - districts.urbanity(junctions))
    hubs = junctions[:1]
    for number in rng.permutation(len(junctions)):
        if ((hubs - junctions[number]) ** 2).sum(axis=1).min() > spacing[number] ** 2:
            hubs = np.concatenate([hubs, junctions[[number]]])
    return hubs


def smoothed(junctions: np.ndarray, streets: np.ndarray, road_class: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Straighten arterials and motorways: move each inner junction towards the midpoint of its neighbors."""
    one, other = streets[road_class > LOCAL].T
    degree = np.bincount(np.concatenate([one, other]), minlength=len(junctions))
    inner = (degree == 2)[:, None]
    for _ in range(rounds):
        total = np.zeros_like(junctions)
        np.add.at(total, one, junctions[other])
        np.add.at(total, other, junctions[one])
        junctions = np.where(inner, 0.5 * junctions + 0.25 * total, junctions)
    return junctions
