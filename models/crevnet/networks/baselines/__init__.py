"""Models that CrevNet is compared with: published architectures, each with a configuration. All of them can be trained."""

from crevnet.networks.baselines.convlstm import ConvLSTM as ConvLSTM
from crevnet.networks.baselines.convlstm import ConvLSTMConfig as ConvLSTMConfig
from crevnet.networks.baselines.prednet import PredNet as PredNet
from crevnet.networks.baselines.prednet import PredNetConfig as PredNetConfig
from crevnet.networks.baselines.predrnn import PredRNN as PredRNN
from crevnet.networks.baselines.predrnn import PredRNNConfig as PredRNNConfig
from crevnet.networks.baselines.predrnnpp import PredRNNPlusPlus as PredRNNPlusPlus
from crevnet.networks.baselines.predrnnpp import PredRNNPlusPlusConfig as PredRNNPlusPlusConfig
from crevnet.networks.baselines.recurrent import RecurrentBaseline as RecurrentBaseline
from crevnet.networks.baselines.recurrent import StackedConfig as StackedConfig
from crevnet.networks.baselines.unet import UNet as UNet
from crevnet.networks.baselines.unet import UNetConfig as UNetConfig
from crevnet.networks.baselines.vpn import VPN as VPN
from crevnet.networks.baselines.vpn import VPNConfig as VPNConfig
