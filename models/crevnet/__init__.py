"""CrevNet: Conditionally Reversible Video Prediction, on revflow.

The names below are imported when they are first used, since PyTorch takes seconds, and the command line often needs none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "PRESETS": "crevnet.networks.config",
    "CrevNetConfig": "crevnet.networks.config",
    "ModelConfig": "crevnet.networks.config",
    "TwoWayAutoencoder": "crevnet.networks.crevnet.autoencoder",
    "ConvLSTMCell": "crevnet.networks.crevnet.cells",
    "STLSTMCell": "crevnet.networks.crevnet.cells",
    "CrevNet": "crevnet.networks.crevnet.network",
    "Predictor": "crevnet.networks.crevnet.predictor",
    "PredictorState": "crevnet.networks.crevnet.predictor",
    "ReversiblePredictiveModule": "crevnet.networks.crevnet.predictor",
    "MODELS": "crevnet.networks.models",
    "make_network": "crevnet.networks.models",
    "VideoModel": "crevnet.networks.video_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
