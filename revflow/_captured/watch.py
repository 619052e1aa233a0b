"""One evaluation of a conditioner on fake tensors, which shows its side effects."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from revflow._base.stepwise import Stepwise
from revflow._base.streams import Streams, versions_of
from revflow._base.torch_capture import arguments_of, has_hooks_of_saved_tensors
from revflow._base.torch_private import (
    BatchNorm,
    FakeTensor,
    TorchDispatchMode,
    fake_tensor,
    has_global_hook,
    has_own_hook,
    is_compiled,
    pytree,
)
from revflow._captured.region import evaluating
from revflow._captured.tensors import holders_of
from revflow._guard.graph_search import untracked
from revflow._replay.attributes import Attributes
from revflow._replay.autocast import autocast, autocast_state
from revflow._replay.undisturbed import undisturbed

DRAWS = "draws random numbers{}, and its second evaluation would draw others"


class ObjectionError(RuntimeError):
    """The reason why a block cannot be captured."""


def watched(
    block: nn.Module, module: nn.Module, evaluate: Callable[[], Streams], inputs: Streams
) -> tuple[tuple[str, ...], Streams]:
    """The names of buffers of the block that an evaluation of the module changes, and its result.

    ObjectionError if it does more than that.
    """
    attributes = Attributes([*module.modules()])
    buffers, own = dict(block.named_buffers()), [holder.tensor for holder in holders_of(block)]
    known = [*inputs, *own]
    before, states = versions_of(known), _states_of_generators()
    with _Watch(known) as watch:
        result = evaluate()
    if watch.objection or states != _states_of_generators():
        raise ObjectionError(f"{_kind(module)} {watch.objection or DRAWS.format('')}")
    written = [t for t, v, w in zip(known, before, versions_of(known), strict=True) if v != w or id(t) in watch.written]
    moving = _moving(block, module, buffers, written)
    replaced = dict(block.named_buffers())
    attributes.keep_changes()
    if (
        attributes.have_changed
        or replaced.keys() != buffers.keys()
        or any(replaced[n] is not b for n, b in buffers.items())
    ):
        raise ObjectionError(f"{_kind(module)} stores a tensor in an attribute or a buffer")
    if untracked([r for r in result if r.requires_grad], known) is not None:  # type: ignore[arg-type]
        raise ObjectionError(
            f"{_kind(module)} uses a tensor that needs a gradient, and is not its parameter or an argument"
        )
    result = tuple([r.detach() for r in result])
    if watch.holds_more([*result, *known]):
        raise ObjectionError(
            f"{_kind(module)} computes a tensor that is still held after its evaluation, for example in a list"
        )
    return moving, result


def _moving(
    block: nn.Module, module: nn.Module, buffers: dict[str, Tensor], written: Sequence[Tensor]
) -> tuple[str, ...]:
    """The names of the changed buffers. ObjectionError if one is not a statistic of BatchNorm, or if other tensors change."""
    moving = tuple([name for name, buffer in buffers.items() if any([buffer is t for t in written])])
    for name in moving:
        holder = block.get_submodule(name.rpartition(".")[0])
        if not (isinstance(holder, BatchNorm) and holder.training):
            raise ObjectionError(f"{_kind(module)} changes the buffer {name} in place")
    if len({*map(id, written)}) > len(moving):
        raise ObjectionError(f"{_kind(module)} changes its input, a parameter or an attribute in place")
    return moving


class _Watch(TorchDispatchMode):
    """Sees each operation of an evaluation."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {*map(id, known)}
        self.objection = ""
        """The first reason why an operation cannot be captured."""
        self.written: set[int] = set()
        """The tensors that it changes, by identity. Not all operators raise a tensor's version: BatchNorm's do not."""
        self._made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = arguments_of(func)
        given = {a.name: a.default_value for a in arguments if a.has_default_value()} | (kwargs or {})
        given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        statistics = [given[name] for name in ("running_mean", "running_var") if given.get("training")]
        self.written |= {id(t) for t in (*written, *statistics)}
        self.objection = self.objection or self._objection(func, given)
        result = func(*args, **(kwargs or {}))
        self._made += [StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        return result

    def _objection(self, func: Any, given: dict[str, Any]) -> str:
        shares = [given[name] for name in ("dropout_p", "dropout") if name in given]
        if any(shares) or (torch.Tag.nondeterministic_seeded in func.tags and not shares):
            return DRAWS.format(f" ({func.name().removeprefix('aten::')})")
        if has_hooks_of_saved_tensors():
            return "uses torch.utils.checkpoint, or other hooks for saved tensors"
        if func is torch.ops.aten.lift_fresh.default:  # of a `torch.tensor(...)` in the code
            return ""
        # A tensor that the evaluation has made has no data.
        tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and not isinstance(t, FakeTensor)]
        if all([id(t) in self._known for t in tensors]):
            return ""
        return "uses a tensor that is not an argument, a parameter, a buffer or an attribute"

    def holds_more(self, known: Sequence[Tensor]) -> bool:
        """Whether memory of the evaluation exists that is not that of the known tensors."""
        its = {StorageWeakRef(t.untyped_storage()) for t in known}
        return any([not made.expired() and made not in its for made in self._made])


def refuse_hooks(block: nn.Module) -> None:
    if has_global_hook():
        raise ObjectionError("a hook is registered for all modules")
    if isinstance(block, Stepwise) and not block.unobserved:
        raise ObjectionError("it has hooks, or overrides `forward` or `inverse`")
    for m in block.modules():
        if has_own_hook(m):
            raise ObjectionError(f"{_kind(m)} has hooks")
        if is_compiled(m):
            raise ObjectionError(f"{_kind(m)} is compiled by itself")


@contextmanager
def objections_to(name: str, module: nn.Module) -> Iterator[None]:
    """A context in which errors become an `ObjectionError` that names the module."""
    try:
        yield
    except ObjectionError as objection:
        raise ObjectionError(f"{name} ({type(module).__name__}): {objection}") from objection
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ObjectionError(f"{name} ({type(module).__name__}) cannot be traced: {reason}") from error


@contextmanager
def evaluated_without_data(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context for first evaluations on fake tensors. At its end, attributes, buffers and random states are as before.

    Meanwhile, modules have copies of their buffers: a fake-tensor mode changes small tensors of integers, such as BatchNorm's
    counter, in fact.
    """
    before = {m: dict(vars(m)) for m in module.modules()}
    fake_mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    uncached = autocast(autocast_state(device), device)
    with undisturbed(module, device), fake_mode, uncached, torch.enable_grad(), evaluating():
        try:
            yield
        finally:
            for m, attributes in before.items():
                vars(m).clear()
                vars(m).update(attributes)


def _states_of_generators() -> list[Any]:
    """The states of the random generators that are not PyTorch's."""
    numpy = sys.modules.get("numpy")
    return [random.getstate(), *([] if numpy is None else [str(numpy.random.get_state())])]


def _kind(module: nn.Module) -> str:
    return f"a {type(module).__name__}"
