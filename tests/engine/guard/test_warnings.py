"""Warnings point to the line of the user's code that ran the backward pass."""

import _thread
import linecache
import warnings

import pytest
import torch
from torch import nn

import revflow
from engine.cells import CELLS, Cell, given, loss_of
from revflow._base.user_warnings import warn


class Off(revflow.AdditiveCoupling):
    """A coupling with a small error in its inverse."""

    @staticmethod
    def separate(y, shift):
        return y - (1 + 1e-3) * shift


class Imprecise(Cell):
    """A cell with a small error in its second evaluation."""

    def update(self, *given):
        state, memory = super().update(*given)
        return tuple((1 + 1e-3 * revflow.is_recomputing()) * t for t in state), memory


def line_of(found):
    (warning,) = found
    assert warning.filename == __file__
    return linecache.getline(warning.filename, warning.lineno).strip()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_of_a_sequence(device):
    torch.manual_seed(0)
    net = revflow.ReversibleSequence([Off(nn.Linear(4, 4)) for _ in range(3)]).to(device)
    y = net(torch.randn(2, 8, device=device))
    with pytest.warns(revflow.ReconstructionWarning) as found:
        y.sum().backward()
    assert line_of(found) == "y.sum().backward()"


def test_of_a_recurrence():
    torch.manual_seed(0)
    net = revflow.ReversibleRecurrence([Imprecise(True, 0.0) for _ in range(CELLS)]).float()
    loss = loss_of(net(*given(steps=5, dtype=torch.float32)))
    with pytest.warns(revflow.ReconstructionWarning) as found:
        loss.backward()
    assert line_of(found) == "loss.backward()"


def test_of_a_thread_of_autograd():
    """On a GPU the backward pass runs in such a thread, and its stack has no line of the user's code."""
    done, found = _thread.allocate_lock(), []

    def show(message, category, filename, lineno, *_):
        found.append((filename, linecache.getline(filename, lineno).strip()))
        done.release()

    def _engine_run_backward():  # the name of PyTorch's function that waits
        _thread.start_new_thread(warn, ("a message", UserWarning))
        return done.acquire(timeout=60)

    done.acquire()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        assert _engine_run_backward()
    assert found == [(__file__, "return done.acquire(timeout=60)")]
