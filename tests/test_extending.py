"""The coupling that docs/extending.md writes, put to a part of the engine's contract as that page says."""

import re
from pathlib import Path

import pytest

from engine import nets
from engine.exact import test_exact_life
from engine.rewind import test_gradients, test_graph_life, test_inverse, test_log_det, test_state

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
CONTRACT = [
    test_gradients.test_equal_plain_autograd,
    test_gradients.test_finite_differences,
    test_gradients.test_gradient_of_any_parameters_reruns_no_block_in_vain,
    test_inverse.test_undoes_forward,
    test_inverse.test_is_differentiable,
    test_log_det.test_equals_that_of_autograds_jacobian,
    test_graph_life.test_a_retained_graph_gives_the_same_again,
    test_state.test_batch_norm_moves_its_statistics_once,
    test_exact_life.test_log_det,
]


@pytest.fixture(scope="module")
def stack():
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)

    def sigmoid(channels=4, **options):
        return names["SigmoidCoupling"](nets.Conditioner(channels, 2, **options))

    return nets.of_one(sigmoid)


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_coupling_of_the_page(stack, test):
    test(stack)
