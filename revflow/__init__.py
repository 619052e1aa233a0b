"""revflow: train deep networks without storing their activations."""

from revflow._guard import ReconstructionError as ReconstructionError
from revflow._guard import ReconstructionWarning as ReconstructionWarning
from revflow._mode import ordinary_autograd as ordinary_autograd
from revflow._replay import is_recomputing as is_recomputing
from revflow._version import __version__ as __version__
from revflow.bijection import Bijection as Bijection
from revflow.bijection import PixelUnshuffle as PixelUnshuffle
from revflow.budget import Plan as Plan
from revflow.convert import TwoStreams as TwoStreams
from revflow.convert import reversible as reversible
from revflow.coupling import AdditiveCoupling as AdditiveCoupling
from revflow.coupling import AffineCoupling as AffineCoupling
from revflow.coupling import Coupling as Coupling
from revflow.coupling import GatedCoupling as GatedCoupling
from revflow.exact import Grid as Grid
from revflow.exact import Residual as Residual
from revflow.memory import BatchMemory as BatchMemory
from revflow.memory import MemoryReport as MemoryReport
from revflow.memory import measure_memory as measure_memory
from revflow.memory import predict_memory as predict_memory
from revflow.recurrence import RecurrentCell as RecurrentCell
from revflow.recurrence import RecurrentState as RecurrentState
from revflow.recurrence import ReversibleRecurrence as ReversibleRecurrence
from revflow.sequence import ReversibleSequence as ReversibleSequence
from revflow.verify import Verification as Verification
from revflow.verify import verify as verify
