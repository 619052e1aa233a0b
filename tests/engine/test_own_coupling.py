"""The coupling that CONTRIBUTING.md writes, as it stands there, meets the contract of the engine's own blocks."""

import inspect
import re
from pathlib import Path

import pytest

from engine import nets, test_gradients, test_graph_life, test_inverse, test_log_det, test_state

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
PARTS = [test_gradients, test_graph_life, test_inverse, test_state]
CONTRACT = [
    test_log_det.test_equals_that_of_autograds_jacobian
]  # others there have the formulas of the engine's own blocks
CONTRACT += [
    test
    for part in PARTS
    for name, test in inspect.getmembers(part, inspect.isfunction)
    if name.startswith("test_") and not name.endswith("_on_cuda") and [*inspect.signature(test).parameters] == ["stack"]
]


@pytest.fixture(scope="module")
def stack():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return nets.of_one(lambda channels=4, **options: names["BoundedCoupling"](nets.Conditioner(channels, 2, **options)))


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_contract(stack, test):
    test(stack)
