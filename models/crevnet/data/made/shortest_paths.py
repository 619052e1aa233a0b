"""Shortest paths along directed edges."""

import heapq

import numpy as np

Exits = list[list[tuple[int, int]]]  # for each junction, the edges that leave it and the junctions that they reach


def directed(streets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tail and head, (2 S,), of the two edges of each street."""
    return streets.ravel(), streets[:, ::-1].ravel()


def exits_of(tail: np.ndarray, head: np.ndarray) -> Exits:
    exits: Exits = [[] for _ in range(int(tail.max()) + 1)]
    for edge, (start, end) in enumerate(zip(tail.tolist(), head.tolist(), strict=True)):
        exits[start].append((edge, end))
    return exits


def shortest_paths(
    exits: Exits, cost: list[float], source: int, target: int | None = None
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
