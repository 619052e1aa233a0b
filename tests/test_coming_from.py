"""The pairs of docs/coming-from.md: both libraries compute the same with the same weights, and these are renamed rightly."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import revflow
from engine.nets import assert_close, image, weighted

PAGE = Path(__file__).parent.parent / "docs" / "coming-from.md"
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
NAMES = [section.splitlines()[0] for section in SECTIONS]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(net):
    x = image(2, 16, 6, 4).requires_grad_()
    for parameter in net.parameters():
        parameter.grad = None
    y = net(x.clone())  # memcnn empties the storage of its input
    weighted(y).backward()
    return [y, x.grad, *(parameter.grad for _, parameter in sorted(net.named_parameters(), key=lambda n: id(n[1])))]


@pytest.mark.filterwarnings("ignore")  # of old code in the other libraries
@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_pair(section):
    for library in re.findall(r"^(?:import|from) (memcnn|revtorch|revlib)", section, flags=re.MULTILINE):
        pytest.importorskip(library)
    torch.manual_seed(0)
    names = {}
    for source in re.findall(r"```python\n(.*?)```", INTRODUCTION + section, re.DOTALL):
        exec(source, names)
    assert_same(names["ours"], names["theirs"], names["weights"])


def assert_same(ours, theirs, weights):
    assert_close(gradients(ours), gradients(theirs))
    # Both halves hold the same parameters: each name has to come to the parameter that it named.
    own = ours.state_dict()
    assert own.keys() == weights.keys()
    assert all(own[name].data_ptr() == value.data_ptr() for name, value in weights.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Naive", "Sigmoid"])
def test_adapters_of_memcnn(name):
    memcnn = pytest.importorskip("memcnn")
    torch.manual_seed(0)
    names = {}
    (conditioners,) = re.findall(r"```python\n(class Naive.*?)```", SECTIONS[0], re.DOTALL)
    sigmoid, *_ = re.findall(r"```python\n(.*?)```", PAGE.with_name("extending.md").read_text("utf-8"), re.DOTALL)
    exec(sigmoid + conditioners, names)
    adapter, coupling, width = {
        "Naive": (memcnn.AffineAdapterNaive, revflow.AffineCoupling, 8),
        "Sigmoid": (memcnn.AffineAdapterSigmoid, names["SigmoidCoupling"], 16),
    }[name]
    pairs = [[nn.Sequential(nn.Conv2d(8, width, 3, padding=1), nn.Tanh()) for _ in "FG"] for _ in range(3)]
    blocks = [memcnn.AffineCoupling(F, G, adapter=adapter) for F, G in pairs]
    theirs = nn.Sequential(*map(memcnn.InvertibleModuleWrapper, blocks))
    ours = revflow.ReversibleSequence([coupling(names[name](F), names[name](G)) for F, G in pairs], split_dim=1)
    assert_same(ours, theirs, {re.sub(r"_fn\.([FG])m", r"\1", key): w for key, w in theirs.state_dict().items()})


def test_one_conditioner_of_memcnn_is_copied():
    memcnn = pytest.importorskip("memcnn")
    F, x = nn.Conv2d(8, 8, 3, padding=1), image(2, 16, 6, 4)
    ours = revflow.ReversibleSequence([revflow.AdditiveCoupling(F, copy.deepcopy(F))])
    assert_close([ours(x)], [memcnn.AdditiveCoupling(F)(x)])


def test_four_libraries_are_compared():
    assert NAMES == ["memcnn", "RevTorch", "revlib", "torch.utils.checkpoint"]


@pytest.mark.filterwarnings("ignore")
def test_revlib_with_a_coupling_of_ones_own():
    """Its default mode's gradients are not those of `no_savings`, which are ordinary autograd's and ours."""
    revlib = pytest.importorskip("revlib")

    class Scaled(revflow.Coupling):
        coefficients = ("shift",)
        combine = staticmethod(lambda x, shift: 0.9 * x + shift)
        separate = staticmethod(lambda y, shift: (y - shift) / 0.9)

    torch.manual_seed(0)
    conditioners = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(4)]
    x = torch.randn(3, 8, dtype=torch.float64)

    def of_blocks(net, blocks):
        net(x.clone().requires_grad_()).square().sum().backward()
        found = [parameter.grad for block in blocks for parameter in block.parameters()]
        return torch.cat([gradient.flatten() for gradient in found])

    def theirs(**options):
        copies = copy.deepcopy(conditioners)
        maps = {"coupling_forward": [lambda o, f: 0.9 * o + f], "coupling_inverse": [lambda o, f: (o - f) / 0.9]}
        return of_blocks(revlib.ReversibleSequential(*copies, split_dim=1, **maps, **options), copies)

    ours = of_blocks(revflow.ReversibleSequence([Scaled(F) for F in conditioners]), conditioners)
    assert torch.allclose(theirs(memory_mode=revlib.MemoryModes.no_savings), ours, rtol=1e-10, atol=1e-12)
    assert (theirs() - ours).norm() > 1e-2 * ours.norm()
