"""Data of CrevNet: Traffic4cast's day files, their road maps, movies, a synthetic city in the same files, and Moving MNIST.

What a run reads, by its settings, is in `city_data`, which is no part of these names since settings need some of them.
"""

from crevnet.data.errors import DataError as DataError
from crevnet.data.files.days import DayFile as DayFile
from crevnet.data.files.days import DayReader as DayReader
from crevnet.data.files.days import check_frame_sizes as check_frame_sizes
from crevnet.data.files.days import open_day as open_day
from crevnet.data.files.days import open_days as open_days
from crevnet.data.files.days import sample_frames as sample_frames
from crevnet.data.files.days import unit_interval as unit_interval
from crevnet.data.files.layouts import Layout as Layout
from crevnet.data.files.layouts import layout_named as layout_named
from crevnet.data.files.layouts import layout_of as layout_of
from crevnet.data.files.protocol import TEST_SLOTS as TEST_SLOTS
from crevnet.data.made.moving_mnist import MovingMNIST as MovingMNIST
from crevnet.data.made.moving_mnist import write_movies as write_movies
from crevnet.data.made.repack import repack as repack
from crevnet.data.made.synthetic import SyntheticCity as SyntheticCity
from crevnet.data.made.synthetic import write_city as write_city
from crevnet.data.maps.road_map import cached_road_map as cached_road_map
from crevnet.data.maps.road_map import road_map as road_map
from crevnet.data.maps.road_map import road_maps as road_maps
from crevnet.data.maps.slot_means import SlotMeans as SlotMeans
from crevnet.data.maps.slot_means import slot_means as slot_means
from crevnet.data.maps.static import StaticInputs as StaticInputs
from crevnet.data.maps.static import static_maps as static_maps
from crevnet.data.windows import Windows as Windows
