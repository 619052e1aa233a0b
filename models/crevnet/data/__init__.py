"""Data of CrevNet: Traffic4cast's day files and road maps, videos, a synthetic city in the same format, and Moving MNIST.

`city_data` reads the data that a run's settings select. It is not imported here, because the settings import these names.
"""

from crevnet.data.days import DayFile as DayFile
from crevnet.data.days import DayReader as DayReader
from crevnet.data.days import check_frame_sizes as check_frame_sizes
from crevnet.data.days import open_day as open_day
from crevnet.data.days import open_days as open_days
from crevnet.data.days import sample_frames as sample_frames
from crevnet.data.days import unit_interval as unit_interval
from crevnet.data.errors import DataError as DataError
from crevnet.data.layouts import Layout as Layout
from crevnet.data.layouts import layout_named as layout_named
from crevnet.data.layouts import layout_of as layout_of
from crevnet.data.moving_mnist import MovingMNIST as MovingMNIST
from crevnet.data.moving_mnist import write_movies as write_movies
from crevnet.data.protocol import TEST_SLOTS as TEST_SLOTS
from crevnet.data.repack import repack as repack
from crevnet.data.road_map import cached_road_map as cached_road_map
from crevnet.data.road_map import road_map as road_map
from crevnet.data.road_map import road_maps as road_maps
from crevnet.data.slot_means import SlotMeans as SlotMeans
from crevnet.data.slot_means import slot_means as slot_means
from crevnet.data.static import StaticInputs as StaticInputs
from crevnet.data.static import static_maps as static_maps
from crevnet.data.synthetic import SyntheticCity as SyntheticCity
from crevnet.data.synthetic import write_city as write_city
from crevnet.data.windows import Windows as Windows
