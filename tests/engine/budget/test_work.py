"""The work of operations, compared with counts by hand."""

import torch
from torch import nn

from revflow._budget.work import OPERATIONS_PER_BYTE, Work


def work(run):
    with Work() as found:
        run()
    return found.total


def test_a_matrix_product_and_an_elementwise_operation():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert work(lambda: a @ b) == 2 * 3 * 4 * 5 + OPERATIONS_PER_BYTE * 4 * (3 * 4 + 4 * 5 + 3 * 5)
    assert work(lambda: a + a) == OPERATIONS_PER_BYTE * 4 * 3 * (3 * 4)


def test_a_view_is_free():
    a = torch.randn(3, 4)
    assert work(lambda: a.t().reshape(-1, 3).detach()) == 0


def test_attention_on_a_cpu_counts_its_two_products():
    q = torch.randn(1, 2, 8, 4)
    run = lambda: nn.functional.scaled_dot_product_attention(q, q, q)  # noqa: E731
    traffic = OPERATIONS_PER_BYTE * 4 * (4 * q.numel() + 2 * 8)  # the last are the sums of the softmax
    assert work(run) == 2 * (2 * 2 * 8 * 8 * 4) + traffic
