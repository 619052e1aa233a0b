"""CrevNet: Conditionally Reversible Video Prediction, on revflow."""

from crevnet.networks.config import PRESETS as PRESETS
from crevnet.networks.config import CrevNetConfig as CrevNetConfig
from crevnet.networks.config import ModelConfig as ModelConfig
from crevnet.networks.crevnet.autoencoder import TwoWayAutoencoder as TwoWayAutoencoder
from crevnet.networks.crevnet.cells import ConvLSTMCell as ConvLSTMCell
from crevnet.networks.crevnet.cells import STLSTMCell as STLSTMCell
from crevnet.networks.crevnet.network import CrevNet as CrevNet
from crevnet.networks.crevnet.predictor import Predictor as Predictor
from crevnet.networks.crevnet.predictor import PredictorState as PredictorState
from crevnet.networks.crevnet.predictor import ReversiblePredictiveModule as ReversiblePredictiveModule
from crevnet.networks.models import MODELS as MODELS
from crevnet.networks.models import make_network as make_network
from crevnet.networks.video_model import VideoModel as VideoModel
