"""A random road network of a city, drawn on pixels of 100 m.

Junctions lie on a warped, jittered lattice, close together in the centre and far apart outside. The streets between
them are the Gabriel graph of the junctions, which is planar and connected: two junctions are joined if the circle whose
diameter connects them contains no third. Shortest paths between the centre, the sub-centres and the city's edge become
arterials. Those along a ring, and along the radials outside it, become motorways. Both are smoothed by moving junctions.

Points are (row, column) in pixels, rows counted southwards as in Traffic4cast's frames. Each street is two directed
edges 2i and 2i + 1, so the opposite direction of edge e is e ^ 1.
"""

import heapq
from dataclasses import dataclass

import numpy as np

PIXEL_METRES = 100.0
LOCAL, ARTERIAL, MOTORWAY = range(3)
SPEED_LIMITS = np.array([30.0, 50.0, 80.0]) / 3.6  # m/s of each road class
LANES = np.array([1, 2, 3])  # of each road class, in each direction

_BLOCK = 4.0  # distance of two junctions in the centre, in pixels
_CARRIAGEWAY_OFFSET = 0.5  # of a motorway's directions from its axis, in pixels


@dataclass(frozen=True)
class RoadNetwork:
    """Directed edges between junctions and the cells (edge, pixel) that they pass.

    Attributes:
        junctions: (N, 2) float64, row and column.
        urbanity: (N,) float64 in [0, 1], 1 in the city's centre.
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
        exits = _exits(self.tail, self.head)
        cost = self.travel_time.tolist()
        found = [_shortest_paths(exits, cost, int(destination)) for destination in destinations]
        times, reached_by = (np.array(part) for part in zip(*found, strict=True))
        # Times are equal in both directions, so a route to a destination is the reversed route from it.
        return times, np.where(reached_by >= 0, reached_by ^ 1, -1)


def build_road_network(height: int, width: int, rng: np.random.Generator) -> RoadNetwork:
    """A connected random network that fills height x width pixels."""
    extent = np.array([height, width], dtype=float)
    centres, radii = _centres(extent, rng)
    junctions = _junctions(extent, centres, radii, rng)
    streets = _streets(junctions, rng)
    junctions, streets = _largest_component(junctions, streets)
    road_class = _promote(junctions, streets, extent, centres, radii, rng)
    junctions = _smooth(junctions, streets, road_class)
    return _rasterise(junctions, _urbanity(junctions, centres, radii), streets, road_class, extent, rng)


def _centres(extent: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The city's centre, then its sub-centres, (K, 2), and their radii (K,) in pixels."""
    size = float(np.sqrt(extent.prod()))
    centres = [extent * rng.uniform(0.44, 0.56, 2)]
    radii = [max(0.2 * size, 24.0)]
    for _ in range(int(extent.prod() / 20_000)):
        candidates = extent * rng.uniform(0.1, 0.9, (8, 2))
        distances = np.linalg.norm(candidates[:, None] - np.array(centres), axis=-1).min(axis=1)
        centres.append(candidates[distances.argmax()])
        radii.append(size * rng.uniform(0.04, 0.09))
    return np.array(centres), np.array(radii)


def _urbanity(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    distances = np.linalg.norm(points[:, None] - centres, axis=-1)
    urbanity: np.ndarray = np.exp(-((distances / radii) ** 2) / 2).max(axis=1)
    return urbanity


def _junctions(extent: np.ndarray, centres: np.ndarray, radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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
    # Every junction in the centre, every second one in the suburbs, every fourth outside, in both directions.
    noise = rng.normal(0, 0.06, len(points))
    urbanity = _urbanity(points, centres, radii) + noise
    level = np.where(urbanity > 0.55, 1, np.where(urbanity > 0.12, 2, 4))
    kept = (index % level[:, None] == 0).all(axis=1)
    points = points[kept] + rng.normal(0, 0.13 * _BLOCK, (kept.sum(), 2)) * level[kept, None]
    inside: np.ndarray = points[((points >= 1) & (points <= extent - 2)).all(axis=1)]
    return inside


def _streets(junctions: np.ndarray, rng: np.random.Generator, neighbours: int = 16) -> np.ndarray:
    """The Gabriel graph of the junctions with some streets removed at random, (S, 2) pairs of junctions."""
    count = min(neighbours, len(junctions) - 1)
    nearest = np.empty((len(junctions), count), dtype=np.int64)
    squares = np.empty((len(junctions), count))
    for block in np.array_split(np.arange(len(junctions)), max(1, len(junctions) // 256)):
        square = ((junctions[block, None] - junctions) ** 2).sum(axis=-1)
        order = np.argpartition(square, count, axis=1)[:, : count + 1]
        order = np.take_along_axis(order, np.take_along_axis(square, order, axis=1).argsort(axis=1), axis=1)[:, 1:]
        nearest[block] = order
        squares[block] = np.take_along_axis(square, order, axis=1)
    # A third point k in the circle over ij is nearer to i than j is, so searching i's neighbours is sufficient.
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


def _promote(
    junctions: np.ndarray,
    streets: np.ndarray,
    extent: np.ndarray,
    centres: np.ndarray,
    radii: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """The road class of each street, (S,)."""
    road_class = np.full(len(streets), LOCAL)
    tail, head = _directed(streets)
    cost = np.linalg.norm(junctions[tail] - junctions[head], axis=1).tolist()
    exits = _exits(tail, head)

    def nearest(point: np.ndarray) -> int:
        return int(((junctions - point) ** 2).sum(axis=1).argmin())

    def join(one: np.ndarray, other: np.ndarray, to: int) -> None:
        source, target = nearest(one), nearest(other)
        _, reached_by = _shortest_paths(exits, cost, source, target)
        while target != source:
            edge = reached_by[target]
            if road_class[edge // 2] == LOCAL:
                # Existing roads are cheap, so that paths merge into trunk roads.
                cost[edge] = cost[edge ^ 1] = 0.55 * cost[edge]
            road_class[edge // 2] = max(to, road_class[edge // 2])
            target = tail[edge]

    centre, ring_radius = centres[0], 1.3 * radii[0]
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    around = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    if 2.4 * ring_radius < extent.min():
        ring = centre + ring_radius * around
        for one, other in zip(ring, np.roll(ring, 1, axis=0), strict=True):
            join(one, other, MOTORWAY)
        for direction in around[::3]:
            join(centre + ring_radius * direction, centre + extent.max() * direction, MOTORWAY)
    for direction in around[1::2]:
        join(centre, centre + extent.max() * direction, ARTERIAL)
    hubs = _hubs(junctions, centres, radii, rng)
    for number, hub in enumerate(hubs):
        for other in np.linalg.norm(hubs - hub, axis=1).argsort()[1:4]:
            if number < other:
                join(hub, hubs[other], ARTERIAL)
    return road_class


def _hubs(junctions: np.ndarray, centres: np.ndarray, radii: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Junctions spread over the city, (M, 2), about 2 km apart in the centre and 5 km outside."""
    spacing = 20 + 30 * (1 - _urbanity(junctions, centres, radii))
    hubs = junctions[:1]
    for number in rng.permutation(len(junctions)):
        if ((hubs - junctions[number]) ** 2).sum(axis=1).min() > spacing[number] ** 2:
            hubs = np.concatenate([hubs, junctions[[number]]])
    return hubs


def _smooth(junctions: np.ndarray, streets: np.ndarray, road_class: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Straighten arterials and motorways: move each inner junction towards the midpoint of its neighbours."""
    one, other = streets[road_class > LOCAL].T
    degree = np.bincount(np.concatenate([one, other]), minlength=len(junctions))
    inner = (degree == 2)[:, None]
    for _ in range(rounds):
        total = np.zeros_like(junctions)
        np.add.at(total, one, junctions[other])
        np.add.at(total, other, junctions[one])
        junctions = np.where(inner, 0.5 * junctions + 0.25 * total, junctions)
    return junctions


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
    tail, head = _directed(streets)
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


def _directed(streets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tail and head, (2 S,), of the two edges of each street."""
    return streets.ravel(), streets[:, ::-1].ravel()


_Exits = list[list[tuple[int, int]]]  # for each junction, the edges that leave it and the junctions that they reach


def _exits(tail: np.ndarray, head: np.ndarray) -> _Exits:
    exits: _Exits = [[] for _ in range(int(tail.max()) + 1)]
    for edge, (start, end) in enumerate(zip(tail.tolist(), head.tolist(), strict=True)):
        exits[start].append((edge, end))
    return exits


def _shortest_paths(
    exits: _Exits, cost: list[float], source: int, target: int | None = None
) -> tuple[list[float], list[int]]:
    """Dijkstra's algorithm: the cost from `source` and the edge that reaches each junction (-1: none); stops at `target`."""
    total = [np.inf] * len(exits)
    reached_by = [-1] * len(exits)
    total[source] = 0.0
    queue = [(0.0, source)]
    while queue:
        so_far, junction = heapq.heappop(queue)
        if junction == target:
            break
        if so_far > total[junction]:
            continue
        for edge, end in exits[junction]:
            there = so_far + cost[edge]
            if there < total[end]:
                total[end] = there
                reached_by[end] = edge
                heapq.heappush(queue, (there, end))
    return total, reached_by
