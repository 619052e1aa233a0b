"""The models that CrevNet is compared with: published architectures, all with one interface, and all trainable.

`make_baseline("predrnn", Task(channels=3, patch=4))` makes one.
"""

from __future__ import annotations

from collections.abc import Callable

from crevnet.baselines.baseline import Baseline as Baseline
from crevnet.baselines.baseline import Task as Task
from crevnet.baselines.convlstm import ConvLSTM as ConvLSTM
from crevnet.baselines.prednet import PredNet as PredNet
from crevnet.baselines.predrnn import PredRNN as PredRNN
from crevnet.baselines.predrnnpp import PredRNNPlusPlus as PredRNNPlusPlus
from crevnet.baselines.recurrent import RecurrentBaseline as RecurrentBaseline
from crevnet.baselines.unet import UNet as UNet
from crevnet.baselines.vpn import VPN as VPN

BASELINES: dict[str, Callable[[Task], Baseline]] = {
    "convlstm": ConvLSTM,
    "predrnn": PredRNN,
    "predrnnpp": PredRNNPlusPlus,
    "vpn": VPN,
    "prednet": PredNet,
    "unet": UNet,
}


def make_baseline(name: str, task: Task) -> Baseline:
    """The baseline of that name, in its paper's size.

    Raises ValueError for a name that is not in BASELINES, and for patches where the model has none.
    """
    if name not in BASELINES:
        raise ValueError(f"name has to be one of {', '.join(BASELINES)}, not {name!r}")
    return BASELINES[name](task)
