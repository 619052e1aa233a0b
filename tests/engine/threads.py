"""Work in several threads at the same time."""

import threading
import time

import torch
from torch import nn


class Slow(nn.Module):
    """Lets the other thread go on, in the midst of an evaluation."""

    def forward(self, x):
        time.sleep(0.001)
        return x


def in_threads(*works):
    errors = []

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def inputs(seed):
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients_of(net, x):
    return torch.autograd.grad(net(x).square().sum(), [*net.parameters()])
