"""CrevNet: Conditionally Reversible Video Prediction, on revflow."""

from crevnet.autoencoder import TwoWayAutoencoder as TwoWayAutoencoder
from crevnet.cells import ConvLSTMCell as ConvLSTMCell
from crevnet.cells import STLSTMCell as STLSTMCell
from crevnet.config import PRESETS as PRESETS
from crevnet.config import CrevNetConfig as CrevNetConfig
from crevnet.config import ModelConfig as ModelConfig
from crevnet.models import MODELS as MODELS
from crevnet.models import make_network as make_network
from crevnet.network import CrevNet as CrevNet
from crevnet.predictor import Predictor as Predictor
from crevnet.predictor import PredictorState as PredictorState
from crevnet.predictor import ReversiblePredictiveModule as ReversiblePredictiveModule
from crevnet.video_model import VideoModel as VideoModel
