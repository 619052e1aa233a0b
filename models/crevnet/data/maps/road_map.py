"""Road maps: how often each pixel of a city has data, computed once and stored in the user's cache folder."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from crevnet.data.files.days import DayFile, check_frame_sizes, sample_frames
from crevnet.data.maps.cache import cache_path, read_cached, write_cached


def road_map(days: Sequence[DayFile], slots: tuple[int, int] | None = None, frames: int = 1200) -> torch.Tensor:
    """The fraction of frames in which a pixel has data (any non-zero channel), float32 (1, H, W) in [0, 1].

    It is taken over at most `frames` frames, spread evenly over the half-open range `slots` (None: the whole day) of `days`, all
    of one city. Raises ValueError without days or frames, and DataError for slots that a day does not contain.
    """
    if not days or frames < 1:
        raise ValueError(
            f"a road map requires at least one day and one frame; got {len(days)} days and frames={frames}"
        )
    check_frame_sizes(days)
    seen, count = np.zeros(days[0].shape[1:3], dtype=np.int64), 0
    for frame in sample_frames(days, slots, frames):
        seen += frame.any(axis=-1)
        count += 1
    return torch.from_numpy((seen / count).astype(np.float32))[None]


def cached_road_map(days: Sequence[DayFile], slots: tuple[int, int] | None = None, frames: int = 1200) -> torch.Tensor:
    """`road_map`, stored as .npy in `road_maps` of the cache folder.

    It is computed again if the files, `slots` or `frames` change, or if the cache file is damaged. An unwritable cache folder
    is not an error.
    """
    path = cache_path("road_maps", days, slots, frames)
    cached = read_cached(path, (1, *days[0].shape[1:3]), np.float32) if days else None
    if cached is not None:
        return torch.from_numpy(cached.copy())
    computed = road_map(days, slots, frames)
    with suppress(OSError):  # the cache only saves time
        write_cached(path, [computed.numpy()], tuple(computed.shape))
    return computed


def road_maps(days: Sequence[DayFile], slots: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """City -> cached road map, float32 (1, H, W), of all its days in `days`."""
    by_city = defaultdict(list)
    for day in days:
        by_city[day.city].append(day)
    return {city: cached_road_map(of_city, slots) for city, of_city in by_city.items()}
