"""Precisions of a training step, and networks that run in them."""

from __future__ import annotations

import torch

import revflow
from kit.networks import Network

PRECISIONS = {"32-true": None, "tf32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The precisions of conditioners under autocast."""


def set_precision(name: str) -> None:
    """The arithmetic of float32 products and convolutions on CUDA: TF32, or float32."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def prepared(network: Network, precision: str, compiled: bool, device: torch.device) -> None:
    """Make the conditioners run under autocast, and compiled."""
    if PRECISIONS[precision] is not None:
        for conditioner in network.conditioners:
            conditioner.forward = autocast(precision, device)(conditioner.forward)
    if compiled:
        revflow.ReversibleSequence(network.blocks).compile_conditioners()  # in place, so for all methods


def autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
