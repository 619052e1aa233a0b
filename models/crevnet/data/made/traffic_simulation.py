"""Vehicles that drive through a road network for a day.

Trips start in a daily rhythm: in the morning mostly from homes to workplaces, and in the evening back. They follow the fastest
route to the destination's district, with random detours. Traffic on an edge slows as it fills up (Greenshields:
v = v_free (1 - k / k_jam)), so queues form and dissolve without further rules.
"""

from dataclasses import dataclass

import numpy as np

from crevnet.data.made.road_network import LANES, SPEED_LIMITS, RoadNetwork

STEP_SECONDS = 10.0

_VEHICLES_PER_KM = 0.5  # driving in the busiest hour, per km of road, each representing about ten real ones
_JAM_DENSITY = 0.011  # vehicles per metre of lane at which traffic stops
_SHORTEST_QUEUE = 300.0  # metres, the least length of an edge when its density is computed
_SLOWEST = 0.15  # fraction of the free speed that remains in a jam
_DENSITY_MEMORY = np.exp(-STEP_SECONDS / 150)  # drivers react to the density of the last few minutes
_DETOUR = 0.12  # probability of leaving the fastest route at a junction
_DISTRICT_KM = 120.0  # of road in a district

_VEHICLE = np.dtype(
    [
        ("edge", np.int64),
        ("position", np.float64),  # metres from the edge's start
        ("pace", np.float64),  # this driver's speed relative to the others
        ("district", np.int64),  # the trip's destination
        ("remaining", np.float64),  # the trip ends at this distance from the district's center, in seconds
    ]
)


@dataclass(frozen=True)
class Records:
    """Reports of vehicles in one step: one record for each cell that a vehicle enters, or in which it waits.

    Attributes:
        cell: (R,) int64, an index into the network's cells.
        speed: (R,) float64, in m/s.
    """

    cell: np.ndarray
    speed: np.ndarray


class TripDemand:
    """Start times, origins and destinations of trips in a network.

    A district is the set of junctions nearest, in travel time, to one of K centers that are far apart. `density` multiplies
    the number of trips.
    """

    def __init__(self, network: RoadNetwork, density: float, rng: np.random.Generator) -> None:
        kilometers = network.length.sum() / 2000
        centers = _far_apart(network.junctions, int(np.clip(kilometers / _DISTRICT_KM, 4, 64)), rng)
        #: Seconds (K, N) from each junction to each district's center, and the edge (K, N) to take there.
        self.times, self.exits = network.routes(centers)
        self.district = self.times.argmin(axis=0)
        self._homes = np.cumsum(1.15 - network.urbanity)
        self._work = np.cumsum(0.05 + network.urbanity**2)
        free_trip = self.times[self.district[self._sample(self._work, 4096, rng)], self._sample(self._homes, 4096, rng)]
        self._busiest_rate = density * _VEHICLES_PER_KM * kilometers / free_trip.mean()

    def departures(self, hour: float, weekday: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The trips that start in one step: origin and destination junctions, both (T,) int64. Monday is weekday 0."""
        weekend = weekday >= 5
        count = rng.poisson(self._busiest_rate * STEP_SECONDS * _activity(hour, weekend))
        to_work = rng.uniform(size=count) < _share_to_work(hour, weekend)
        homes, work = self._sample(self._homes, count, rng), self._sample(self._work, count, rng)
        return np.where(to_work, homes, work), np.where(to_work, work, homes)

    @staticmethod
    def _sample(cumulative: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        return np.searchsorted(cumulative, rng.uniform(0, cumulative[-1], count), side="right")


class Traffic:
    """The vehicles on a network's roads, moved in steps of STEP_SECONDS."""

    def __init__(self, network: RoadNetwork, demand: TripDemand, rng: np.random.Generator) -> None:
        self.vehicles = np.empty(0, dtype=_VEHICLE)
        self._network = network
        self._demand = demand
        self._rng = rng
        self._free_speed = SPEED_LIMITS[network.road_class]
        self._jam = _JAM_DENSITY * np.maximum(network.length, _SHORTEST_QUEUE) * LANES[network.road_class]
        self._density = np.zeros(len(network.length))
        self._cells = np.diff(network.first_cell)

    def step(self, hour: float, weekday: int) -> Records:
        """Move every vehicle, end and start trips, and return the vehicles' reports."""
        network, vehicles = self._network, self.vehicles
        self._update_density()
        edge, before = vehicles["edge"], self._cell()
        speed = self._speed()
        vehicles["position"] += speed * STEP_SECONDS
        passed = vehicles["position"] - network.length[edge]
        crossing = passed >= 0
        after = self._cell()
        first, last, speeds = [np.minimum(before + 1, after)], [after], [speed]

        arrived = np.zeros(len(vehicles), dtype=bool)
        district = vehicles["district"]
        arrived[crossing] = (self._demand.times[district, network.head[edge]] <= vehicles["remaining"])[crossing]
        turning = np.flatnonzero(crossing & ~arrived)
        following = self._next_edge(vehicles[turning])
        vehicles["edge"][turning] = following
        # A step crosses at most one junction; a vehicle waits at the end of a very short edge.
        vehicles["position"][turning] = np.minimum(passed[turning], network.length[following] * (1 - 1e-9))
        first.append(network.first_cell[following])
        last.append(self._cell()[turning])
        speeds.append(speed[turning])
        self.vehicles = np.concatenate([vehicles[~arrived], self._departing(hour, weekday)])
        return _records(np.concatenate(first), np.concatenate(last), np.concatenate(speeds))

    def _update_density(self) -> None:
        number = np.bincount(self.vehicles["edge"], minlength=len(self._density))
        self._density += (1 - _DENSITY_MEMORY) * (number - self._density)

    def _speed(self) -> np.ndarray:
        edge = self.vehicles["edge"]
        greenshields = np.maximum(1 - self._density[edge] / self._jam[edge], _SLOWEST)
        # Traffic lights, crossings and turning traffic vary the speed along the road.
        hindrance = self._rng.uniform(0.75, 1.05, len(edge))
        speed: np.ndarray = self._free_speed[edge] * greenshields * self.vehicles["pace"] * hindrance
        return speed

    def _cell(self) -> np.ndarray:
        edge = self.vehicles["edge"]
        along = self.vehicles["position"] / self._network.length[edge]
        cells = self._cells[edge]
        cell: np.ndarray = self._network.first_cell[edge] + np.minimum((along * cells).astype(np.int64), cells - 1)
        return cell

    def _next_edge(self, vehicles: np.ndarray) -> np.ndarray:
        network, rng = self._network, self._rng
        edge = vehicles["edge"]
        junction = network.head[edge]
        fastest = self._demand.exits[vehicles["district"], junction]
        # The larger road of two random exits, since detours also prefer larger roads.
        one, other = self._random_exit(edge), self._random_exit(edge)
        detour = np.where(network.road_class[one] >= network.road_class[other], one, other)
        full = self._density[fastest] > rng.uniform(0.4, 1.2, len(edge)) * self._jam[fastest]
        leaves = full | (rng.uniform(size=len(edge)) < _DETOUR) | (fastest < 0) | (fastest == edge ^ 1)
        return np.where(leaves, detour, fastest)

    def _random_exit(self, edge: np.ndarray) -> np.ndarray:
        """A random exit of the junction at the end of each edge; never back along the edge, except in a dead end."""
        network = self._network
        first = network.first_exit[network.head[edge]]
        count = network.first_exit[network.head[edge] + 1] - first
        drawn = self._rng.integers(0, count)
        back = network.exits[first + drawn] == edge ^ 1
        exits: np.ndarray = network.exits[first + np.where(back, (drawn + 1) % count, drawn)]
        return exits

    def _departing(self, hour: float, weekday: int) -> np.ndarray:
        origin, destination = self._demand.departures(hour, weekday, self._rng)
        district = self._demand.district[destination]
        departing = np.empty(len(origin), dtype=_VEHICLE)
        exits = self._demand.exits[district, origin]
        departing["edge"] = np.where(exits >= 0, exits, self._network.exits[self._network.first_exit[origin]])
        departing["position"] = self._rng.uniform(0, 1, len(origin)) * self._network.length[departing["edge"]]
        departing["pace"] = np.clip(self._rng.normal(1, 0.1, len(origin)), 0.7, 1.3)
        departing["district"] = district
        departing["remaining"] = self._demand.times[district, destination]
        return departing


def _records(first: np.ndarray, last: np.ndarray, speed: np.ndarray) -> Records:
    """One record of `speed` in each of the cells first..last, for each vehicle."""
    count = last - first + 1
    cell = np.arange(count.sum()) + np.repeat(last + 1 - np.cumsum(count), count)
    return Records(cell, np.repeat(speed, count))


def _far_apart(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (count,) of points, each the farthest from those before it."""
    chosen = [int(rng.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


def _activity(hour: float, weekend: bool) -> float:
    """Rate of trips that start at an hour of the day, relative to the busiest hour."""

    def peak(at: float, width: float) -> float:
        away = (hour - at + 12) % 24 - 12  # hours past midnight belong to the evening before
        return float(np.exp(-((away / width) ** 2) / 2))

    if weekend:
        return 0.08 + 0.5 * peak(14.5, 3.5) + 0.15 * peak(22.5, 2.5)
    return 0.05 + 0.65 * peak(8, 1.1) + 0.5 * peak(12.5, 3.2) + 0.65 * peak(17.5, 1.6) + 0.12 * peak(21.5, 2)


def _share_to_work(hour: float, weekend: bool) -> float:
    return 0.5 if weekend else float(0.15 + 0.7 / (1 + np.exp((hour - 12.5) / 2)))
