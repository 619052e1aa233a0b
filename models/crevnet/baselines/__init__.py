"""Models that CrevNet is compared with: published architectures, each with a configuration. All of them can be trained."""

from crevnet.baselines.convlstm import ConvLSTM as ConvLSTM
from crevnet.baselines.convlstm import ConvLSTMConfig as ConvLSTMConfig
from crevnet.baselines.prednet import PredNet as PredNet
from crevnet.baselines.prednet import PredNetConfig as PredNetConfig
from crevnet.baselines.predrnn import PredRNN as PredRNN
from crevnet.baselines.predrnn import PredRNNConfig as PredRNNConfig
from crevnet.baselines.predrnnpp import PredRNNPlusPlus as PredRNNPlusPlus
from crevnet.baselines.predrnnpp import PredRNNPlusPlusConfig as PredRNNPlusPlusConfig
from crevnet.baselines.recurrent import RecurrentBaseline as RecurrentBaseline
from crevnet.baselines.recurrent import StackedConfig as StackedConfig
from crevnet.baselines.unet import UNet as UNet
from crevnet.baselines.unet import UNetConfig as UNetConfig
from crevnet.baselines.vpn import VPN as VPN
from crevnet.baselines.vpn import VPNConfig as VPNConfig
