from collections import Counter
from datetime import date
from itertools import islice
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from crevnet.data.errors import DataError
from crevnet.data.files.days import open_days
from crevnet.data.made import synthetic
from crevnet.data.made.road_classes import ARTERIAL, LOCAL, MOTORWAY
from crevnet.data.made.road_network import SPEED_LIMITS, build_road_network
from crevnet.data.made.synthetic import CitySimulation, SyntheticCity, encode_frame, write_city
from crevnet.data.made.traffic_simulation import STEP_SECONDS, Traffic, TripDemand
from crevnet.data.windows import Windows

SMALL = SyntheticCity(name="Smallville", height=48, width=40, training_days=1, validation_days=0)
MONDAY = date(2018, 1, 1)


def read(path):
    with h5py.File(path) as file:
        return file["array"][:]


def some_frames(seed=0, count=3, **options):
    return np.stack(
        list(islice(CitySimulation(SyntheticCity(height=48, width=40, seed=seed, **options)).frames(MONDAY), count))
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    write_city(SMALL, root)
    return root


@pytest.fixture(scope="module")
def network():
    return build_road_network(128, 112, np.random.default_rng(3))


# --- files


def test_files_are_traffic4cast_files(written):
    days = open_days(written)
    assert [(day.city, day.date, day.shape) for day in days] == [("Smallville", "20180101", (288, 48, 40, 3))]
    assert Windows(days, frames=13)[100]["frames"].shape == (13, 3, 48, 40)
    with h5py.File(days[0].path) as file:
        assert file["array"].dtype == np.uint8
        assert file["array"].compression == "gzip" and file["array"].chunks[0] < 13


def test_days_go_to_training_then_validation_and_progress_reaches_one(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SLOTS_PER_DAY", 4)
    city = SyntheticCity(height=32, width=32, training_days=2, validation_days=1, start_date="2019-12-30")
    done = []
    paths = write_city(city, tmp_path, done.append)
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "Synthopolis/Synthopolis_training/20191230_100m_bins.h5",
        "Synthopolis/Synthopolis_training/20191231_100m_bins.h5",
        "Synthopolis/Synthopolis_validation/20200101_100m_bins.h5",
    ]
    assert np.allclose(done, np.arange(1, 13) / 12)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)


class Interrupted(BaseException):
    pass


def test_interrupted_run_leaves_whole_days_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SLOTS_PER_DAY", 4)
    city = SyntheticCity(height=32, width=32, training_days=2, validation_days=0)

    def interrupt(share):
        if share > 0.6:
            raise Interrupted

    with pytest.raises(Interrupted):
        write_city(city, tmp_path, interrupt)
    [first] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert first.name == "20180101_100m_bins.h5"
    written_at, done = first.stat().st_mtime_ns, []
    paths = write_city(city, tmp_path, done.append)
    assert done == [0.25, 0.5, 0.75, 1.0]
    assert first.stat().st_mtime_ns == written_at and len(paths) == 2
    assert read(paths[1]).shape == (4, 32, 32, 3)
    write_city(city, tmp_path, interrupt)  # nothing left to write


def test_other_files_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SLOTS_PER_DAY", 4)
    city = SyntheticCity(height=32, width=32, training_days=1, validation_days=0)
    [path] = write_city(city, tmp_path)
    with pytest.raises(DataError, match=r'20180101_100m_bins.h5 exists.*"seed": 0.*"seed": 1'):
        write_city(SyntheticCity(height=32, width=32, training_days=1, validation_days=0, seed=1), tmp_path)
    for content in ("array", "other"):
        with h5py.File(path, "w") as file:
            file[content] = np.arange(3)
        before = path.read_bytes()
        with pytest.raises(DataError, match=r"20180101_100m_bins\.h5 exists"):
            write_city(city, tmp_path)
        assert path.read_bytes() == before


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_city(SMALL, tmp_path / "file")


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "a/b"},
        {"name": ".."},
        {"height": 31},
        {"width": 0},
        {"training_days": -1},
        {"seed": -1},
        {"density": 0},
        {"density": float("nan")},
        {"start_date": "yesterday"},
    ],
)
def test_bad_cities_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SyntheticCity(**options)


# --- frames


def test_same_seed_gives_the_same_frames_and_another_seed_others():
    assert np.array_equal(some_frames(seed=5), some_frames(seed=5))
    assert not np.array_equal(some_frames(seed=5), some_frames(seed=6))


def test_a_day_does_not_depend_on_the_days_before(written):
    simulation = CitySimulation(SMALL)
    list(islice(simulation.frames(date(2018, 1, 2)), 1))
    frames = np.stack(list(islice(simulation.frames(MONDAY), 3)))
    assert np.array_equal(frames, read(open_days(written)[0].path)[:3])
    next_monday = np.stack(list(islice(simulation.frames(date(2018, 1, 8)), 3)))
    assert not np.array_equal(frames, next_monday)


def test_frames_are_encoded_as_in_traffic4cast(written):
    array = read(open_days(written)[0].path)
    volume, speed, heading = np.moveaxis(array, -1, 0)
    assert set(np.unique(heading)) == {0, 1, 85, 170, 255}
    assert np.array_equal(volume > 0, speed > 0) and np.array_equal(volume > 0, heading > 0)
    roads = np.zeros(48 * 40, dtype=bool)
    roads[CitySimulation(SMALL).network.cell_pixel] = True
    seen = (volume > 0).any(axis=0)
    assert not seen[~roads.reshape(48, 40)].any()
    assert seen.sum() > 0.9 * roads.sum()
    assert 0.01 < (volume > 0).mean() < 0.25


def test_encoding_of_hand_made_records():
    # cells 0 and 1 are the two directions of one pixel, cell 2 is another pixel
    network = SimpleNamespace(cell_pixel=np.array([4, 4, 1]), cell_heading=np.array([3, 0, 2]))
    cell = np.array([0, 0, 1, 2] + [2] * 200)
    speed = np.array([5.0, 10.0, 15.0] + [0.001] * 201)  # m/s; 10 m/s is 36 km/h, 76.5 of 255
    frame = encode_frame(network, cell, speed, 2, 3)
    assert frame.dtype == np.uint8
    expected = np.zeros((2, 3, 3))
    expected[1, 1] = (6, 76, 255)
    expected[0, 1] = (255, 1, 170)
    assert np.array_equal(frame, expected)


def test_volume_follows_the_hours(written):
    by_hour = read(open_days(written)[0].path)[..., 0].reshape(24, -1).sum(axis=1, dtype=np.int64)
    assert by_hour[4] < 0.3 * by_hour[8]
    assert by_hour[4] < 0.3 * by_hour[17]
    assert by_hour[12] < 0.9 * max(by_hour[8], by_hour[17])


# --- trips


def test_mornings_lead_to_the_center_and_evenings_away(network):
    demand = TripDemand(network, 20.0, np.random.default_rng(0))

    def gain(hour):
        trips = [demand.departures(hour, 0, np.random.default_rng(seed)) for seed in range(20)]
        origin, destination = (np.concatenate(part) for part in zip(*trips, strict=True))
        return (network.urbanity[destination] - network.urbanity[origin]).mean()

    assert gain(8) > 0.05 and gain(18) < -0.05


def test_weekend_mornings_are_quiet_and_density_multiplies_trips(network):
    def trips(weekday, density=1.0):
        demand = TripDemand(network, density, np.random.default_rng(0))
        return sum(len(demand.departures(8, weekday, np.random.default_rng(seed))[0]) for seed in range(200))

    assert trips(6) < 0.5 * trips(4)
    assert trips(4, density=3.0) == pytest.approx(3 * trips(4), rel=0.15)


# --- roads


@pytest.mark.parametrize("seed", range(4))
def test_roads_are_connected(seed):
    network = build_road_network(64, 96, np.random.default_rng(seed))
    exits = {}
    for tail, head in zip(network.tail, network.head, strict=True):
        exits.setdefault(tail, []).append(head)
    reached, waiting = {0}, [0]
    while waiting:
        new = set(exits[waiting.pop()]) - reached
        reached |= new
        waiting.extend(new)
    assert len(reached) == len(network.junctions)


def test_edges_come_in_pairs_of_every_class(network):
    assert np.array_equal(network.tail[::2], network.head[1::2])
    assert np.array_equal(network.tail[1::2], network.head[::2])
    assert set(network.road_class) == {LOCAL, ARTERIAL, MOTORWAY}


def test_cells_lead_from_junction_to_junction(network):
    for edge in range(len(network.tail)):
        cells = slice(network.first_cell[edge], network.first_cell[edge + 1])
        points = np.stack(np.divmod(network.cell_pixel[cells], 112), axis=1)
        assert np.abs(np.diff(points, axis=0)).max(initial=0) == (1 if len(points) > 1 else 0)
        for point, junction in ((points[0], network.tail[edge]), (points[-1], network.head[edge])):
            assert np.abs(point + 0.5 - network.junctions[junction]).max() <= 1.01
        if len(points) > 1:
            # An edge of one heading throughout leads into its quadrant: 0 NW, 1 NE, 2 SW, 3 SE.
            headings = set(network.cell_heading[cells])
            if len(headings) == 1:
                south, east = points[-1] - points[0]
                heading = headings.pop()
                assert (south >= 0 if heading >= 2 else south <= 0) and (east >= 0 if heading % 2 else east <= 0)


def test_fastest_routes_arrive_in_the_stated_time(network):
    destinations = np.array([0, len(network.junctions) // 2])
    times, exits = network.routes(destinations)
    for row, destination in enumerate(destinations):
        for junction in range(0, len(network.junctions), 17):
            at, seconds = junction, 0.0
            while at != destination:
                edge = exits[row, at]
                assert network.tail[edge] == at
                seconds += network.length[edge] / SPEED_LIMITS[network.road_class[edge]]
                at = network.head[edge]
            assert seconds == pytest.approx(times[row, junction])


def test_vehicles_keep_to_the_roads(network):
    demand = TripDemand(network, 1.0, np.random.default_rng(0))
    traffic = Traffic(network, demand, np.random.default_rng(1))
    exits = Counter(network.tail)
    turns = kept = 0
    for _ in range(200):
        before = {vehicle["pace"]: vehicle for vehicle in traffic.vehicles.copy()}  # a driver's pace tells who it is
        records = traffic.step(8, 0)
        for vehicle in traffic.vehicles:
            old = before.get(vehicle["pace"])
            if old is None or vehicle["pace"] in (0.7, 1.3):
                continue
            reach = 1.05 * vehicle["pace"] * SPEED_LIMITS[network.road_class[old["edge"]]] * STEP_SECONDS
            if vehicle["edge"] == old["edge"]:
                kept += 1
                assert 0 < vehicle["position"] - old["position"] <= reach
            else:
                turns += 1
                junction = network.head[old["edge"]]
                assert network.tail[vehicle["edge"]] == junction
                assert vehicle["edge"] != old["edge"] ^ 1 or exits[junction] == 1
                assert vehicle["position"] + network.length[old["edge"]] - old["position"] <= reach + 1e-6
            assert 0 <= vehicle["position"] <= network.length[vehicle["edge"]]
        reported = set(np.searchsorted(network.first_cell, records.cell, side="right") - 1)
        assert reported <= {old["edge"] for old in before.values()} | set(traffic.vehicles["edge"])
        assert len(records.cell) >= len(before)
    assert turns > 500 and kept > 500


def test_full_roads_slow_down_and_recover(network):
    demand = TripDemand(network, 16.0, np.random.default_rng(0))
    traffic = Traffic(network, demand, np.random.default_rng(1))
    traffic.step(8, 0)
    speed = np.array([traffic.step(hour, 0).speed.mean() for hour in [8] * 150 + [4] * 450])
    empty, full, recovered = speed[:15].mean(), speed[135:150].mean(), speed[-100:].mean()
    assert full < 0.75 * empty
    assert recovered > 1.15 * full
