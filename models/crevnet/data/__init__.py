"""Data of CrevNet: Traffic4cast's day files, their road maps, and a synthetic city in the same files."""

from crevnet.data.road_map import cached_road_map as cached_road_map
from crevnet.data.road_map import road_map as road_map
from crevnet.data.road_map import road_maps as road_maps
from crevnet.data.slot_means import SlotMeans as SlotMeans
from crevnet.data.slot_means import slot_means as slot_means
from crevnet.data.static import StaticInputs as StaticInputs
from crevnet.data.synthetic import SyntheticCity as SyntheticCity
from crevnet.data.synthetic import write_city as write_city
from crevnet.data.traffic4cast import TEST_SLOTS as TEST_SLOTS
from crevnet.data.traffic4cast import DataError as DataError
from crevnet.data.traffic4cast import DayFile as DayFile
from crevnet.data.traffic4cast import DayReader as DayReader
from crevnet.data.traffic4cast import Traffic4cast as Traffic4cast
from crevnet.data.traffic4cast import check_frame_sizes as check_frame_sizes
from crevnet.data.traffic4cast import open_day as open_day
from crevnet.data.traffic4cast import open_days as open_days
from crevnet.data.traffic4cast import sample_frames as sample_frames
