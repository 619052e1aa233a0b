"""The pairs of docs/coming-from.md: both libraries compute the same with the same weights, and these are renamed rightly."""

import re
from pathlib import Path

import pytest
import torch

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
    assert_close(gradients(names["ours"]), gradients(names["theirs"]))
    # Both halves hold the same parameters: each name has to come to the parameter that it named.
    own = names["ours"].state_dict()
    assert own.keys() == names["weights"].keys()
    assert all(own[name].data_ptr() == value.data_ptr() for name, value in names["weights"].items())


def test_four_libraries_are_compared():
    assert NAMES == ["memcnn", "RevTorch", "revlib", "torch.utils.checkpoint"]
