"""Errors for modules and changes with which a second evaluation would give wrong gradients or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LAZY = (
    "a {} is not initialized: it has had no input yet, and so has no parameters. Call the network once within "
    "`with torch.no_grad():` before training"
)


def refuse_moved(frozen: Sequence[tuple[Tensor, int]]) -> None:
    """Refuse an evaluation that changed a frozen parameter in place; `frozen` has each parameter's version before it.

    A codebook that follows the data is an example. The second evaluation would start from another codebook, and move it again.
    """
    for parameter, version in frozen:
        if parameter._version != version:
            raise RuntimeError(
                f"the module changes a frozen parameter of shape {tuple(parameter.shape)} in place. The second evaluation would "
                f"start from other values. Make it a buffer, by register_buffer"
            )


@contextmanager
def changes_refused(user: str, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Restore parameters that the evaluation in this context changes, and raise an error that names `user`."""
    copies = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        changed = [(p, c) for p, c in zip(parameters, copies, strict=True) if not torch.equal(p, c)]
        for parameter, copy in changed:
            parameter.data.copy_(copy)
    if changed:
        raise RuntimeError(
            f"{user} changed a parameter of shape {tuple(changed[0][0].shape)}, which is put back. A block that initializes "
            f"itself from its first input must do so before training: call the network once within `with torch.no_grad():`"
        )


def refuse_sharded(module: nn.Module) -> None:
    """Refuse a module on which FSDP's `fully_shard` was called.

    FSDP gathers a module's parameters when the module is called. The engine has then already taken the sharded ones.
    """
    fsdp = sys.modules.get(
        "torch.distributed.fsdp"
    )  # an import here would take long, and is needed only if it was imported
    if fsdp is None or not isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        return
    if next(module.parameters(), None) is not None:
        raise RuntimeError(
            f"fully_shard was called on a {type(module).__name__} that the engine runs by itself: its parameters would get no "
            f"gradient. Call fully_shard on the sequence, on a module that contains the sequence or the recurrence, or on a "
            f"whole coupling"
        )


def refuse_replica(module: nn.Module) -> None:
    """Refuse a replica of torch.nn.DataParallel."""
    if "_is_replica" in module.__dict__:
        raise RuntimeError(
            f"this {type(module).__name__} is a replica of torch.nn.DataParallel, whose parameters are hidden from the engine "
            f"and would get no gradient: use DistributedDataParallel, which is also faster"
        )


def refuse_compiled_autograd() -> None:
    """Refuse compiled autograd; called at the beginning of a backward pass."""
    if torch.compiler.is_compiling():
        _refuse_compiled_autograd()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiled_autograd() -> None:
    raise RuntimeError(
        "compiled autograd is on. It runs a backward pass outside of the autograd engine, on which a sequence or recurrence "
        "depends: leave it off (torch._dynamo.config.compiled_autograd = False), or run the network within "
        "`with revflow.ordinary_autograd():`"
    )
