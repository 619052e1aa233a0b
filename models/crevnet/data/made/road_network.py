"""A random road network of a city, drawn on pixels of 100 m.

Junctions lie on a warped, jittered lattice, close together in the center and far apart outside. The streets between
them are the Gabriel graph of the junctions, which is planar and connected: two junctions are joined if the circle whose
diameter connects them contains no third. Shortest paths between the center, the sub-centers and the city's edge become
arterials. Those along a ring, and along the radials outside it, become motorways. Both are smoothed by moving junctions.

Points are (row, column) in pixels, rows counted southwards as in Traffic4cast's frames. Each street is two directed
edges 2i and 2i + 1, so the opposite direction of edge e is e ^ 1.
"""

from dataclasses import dataclass

import numpy as np

from crevnet.data.made.districts import draw_districts
from crevnet.data.made.road_classes import LOCAL, MOTORWAY, road_classes, smoothed
from crevnet.data.made.shortest_paths import directed, exits_of, shortest_paths
from crevnet.data.made.streets import draw_streets

PIXEL_METRES = 100.0
SPEED_LIMITS = np.array([30.0, 50.0, 80.0]) / 3.6  # m/s of each road class
LANES = np.array([1, 2, 3])  # of each road class, in each direction

_CARRIAGEWAY_OFFSET = 0.5  # of a motorway's directions from its axis, in pixels


@dataclass(frozen=True)
class RoadNetwork:
    """Directed edges between junctions and the cells (edge, pixel) that they pass.

    Attributes:
        junctions: (N, 2) float64, row and column.
        urbanity: (N,) float64 in [0, 1], 1 in the city's center.
        tail, head: (E,) int64, the first and last junction of an edge.
        road_class: (E,) int64, LOCAL, ARTERIAL or MOTORWAY.
        length: (E,) float64, in metres.
        first_cell: (E + 1,) int64; edge e passes the cells first_cell[e] .. first_cell[e + 1] - 1, in this order.
        cell_pixel: (P,) int64, the index row * W + column of a cell's pixel.
        cell_heading: (P,) int64, the direction of travel: 0 NW, 1 NE, 2 SW, 3 SE.
        first_exit: (N + 1,) int64, the index in `exits` of a junction's first edge.
        exits: (E,) int64, the edges sorted by their first junction.
    """

    junctions: np.ndarray
    urbanity: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    road_class: np.ndarray
    length: np.ndarray
    first_cell: np.ndarray
    cell_pixel: np.ndarray
    cell_heading: np.ndarray
    first_exit: np.ndarray
    exits: np.ndarray

    @property
    def travel_time(self) -> np.ndarray:
        """Travel time of each edge at its speed limit, (E,) float64, in seconds."""
        seconds: np.ndarray = self.length / SPEED_LIMITS[self.road_class]
        return seconds

    def routes(self, destinations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fastest routes from every junction to each of K destinations at the speed limits.

        Returns the travel times in seconds, (K, N) float64, and the next edge, (K, N) int64, -1 at the destination.
        """
        exits = exits_of(self.tail, self.head)
        cost = self.travel_time.tolist()
        found = [shortest_paths(exits, cost, int(destination)) for destination in destinations]
        times, reached_by = (np.array(part) for part in zip(*found, strict=True))
        # Times are equal in both directions, so a route to a destination is the reversed route from it.
        return times, np.where(reached_by >= 0, reached_by ^ 1, -1)


def build_road_network(height: int, width: int, rng: np.random.Generator) -> RoadNetwork:
    """A connected random network that fills height x width pixels."""
    extent = np.array([height, width], dtype=float)
    districts = draw_districts(extent, rng)
    junctions, streets = draw_streets(districts, rng)
    road_class = road_classes(junctions, streets, districts, rng)
    junctions = smoothed(junctions, streets, road_class)
    return _rasterise(junctions, districts.urbanity(junctions), streets, road_class, extent, rng)


def _rasterise(
    junctions: np.ndarray,
    urbanity: np.ndarray,
    streets: np.ndarray,
    road_class: np.ndarray,
    extent: np.ndarray,
    rng: np.random.Generator,
) -> RoadNetwork:
    bows = rng.normal(0, 0.05, len(streets)) * (road_class == LOCAL)
    length, pixels, headings = [], [], []
    for (one, other), bow, kind in zip(streets, bows, road_class, strict=True):
        chord = junctions[other] - junctions[one]
        left = np.array([-chord[1], chord[0]])
        t = np.linspace(0, 1, int(5 * np.abs(chord).max()) + 2)[:, None]
        curve = junctions[one] + t * chord + 4 * bow * t * (1 - t) * left
        tangent = chord + 4 * bow * (1 - 2 * t) * left
        metres = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum() * PIXEL_METRES
        for points, direction in ((curve, tangent), (curve[::-1], -tangent[::-1])):
            right = np.stack([direction[:, 1], -direction[:, 0]], axis=1) / np.linalg.norm(direction, axis=1)[:, None]
            lane = points + (_CARRIAGEWAY_OFFSET * right if kind == MOTORWAY else 0)
            row, column = np.clip(np.floor(lane), 0, extent - 1).astype(np.int64).T
            pixel = row * int(extent[1]) + column
            new = np.flatnonzero(np.diff(pixel, prepend=-1))
            length.append(metres)
            pixels.append(pixel[new])
            headings.append(2 * (direction[new, 0] > 0) + (direction[new, 1] > 0))
    tail, head = directed(streets)
    return RoadNetwork(
        junctions=junctions,
        urbanity=urbanity,
        tail=tail,
        head=head,
        road_class=road_class.repeat(2),
        length=np.array(length),
        first_cell=np.concatenate([[0], np.cumsum([len(pixel) for pixel in pixels])]),
        cell_pixel=np.concatenate(pixels),
        cell_heading=np.concatenate(headings),
        first_exit=np.concatenate([[0], np.cumsum(np.bincount(tail, minlength=len(junctions)))]),
        exits=np.argsort(tail, kind="stable"),
    )
