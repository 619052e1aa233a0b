"""ReversibleSequence: a chain of invertible blocks that trains without storing what happens between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn

from revflow._passes import Streams, as_streams
from revflow._replay import is_recomputing
from revflow._rewind import Tape, anchor, through


class ReversibleSequence(nn.Sequential):
    """A chain of invertible blocks, to be used like `nn.Sequential`.

    In training nothing between the blocks is stored: the backward pass rebuilds each block's input from its output. What
    stays alive after the forward pass is the output, however many blocks there are (a gated block keeps one stream). Each
    conditioner runs twice a training step, so a step costs about 4/3 of an ordinary one.

    Args:
        blocks: couplings, bijections, or any modules with `forward(*streams, **context)` and `inverse(*streams, **context)`.
        split_dim: where a single tensor is split in halves.

    Called with a tensor, it splits it in two streams along `split_dim`, and returns one tensor; called with a tuple of
    streams it returns a tuple. Keyword arguments reach every block's conditioners; tensors among them, in lists or
    dictionaries too, get gradients. Under `no_grad`, forward-mode differentiation and `torch.func`'s transforms it runs as
    ordinary modules do. Dropout, autocast, train/eval mode and
    BatchNorm's statistics are the same in both runs. Parameters, context and the output must not change in place before
    the backward pass: PyTorch's error says so.

    Raises ValueError, TypeError or RuntimeError with the block's number and the shapes of its streams; second derivatives
    are refused (`plain` has them).
    """

    def __init__(self, blocks: Iterable[nn.Module] = (), split_dim: int = 1) -> None:
        super().__init__()
        for index, block in enumerate(blocks):
            if not isinstance(block, nn.Module) or not callable(getattr(block, "inverse", None)):
                raise TypeError(
                    f"block {index} has to be a module with forward and inverse; got a {type(block).__name__}. "
                    f"A residual function F becomes a block as revflow.AdditiveCoupling(F)"
                )
            self.append(block)
        self.split_dim = split_dim

    def forward(self, x: Tensor | Streams, **context: Any) -> Any:  # type: ignore[override]
        """The chain's output: a tensor for a tensor, a tuple for a tuple of streams."""
        return self._run(x, context, inverse=False)

    def inverse(self, y: Tensor | Streams, **context: Any) -> Any:
        """The input that `forward` maps to `y`: differentiable, and as frugal as forward."""
        return self._run(y, context, inverse=True)

    def plain(self, x: Tensor | Streams, **context: Any) -> Any:
        """`forward` under ordinary autograd, which stores every activation: the same function, the same parameters."""
        streams = self._split(x)
        for index, block in enumerate(self):
            with self._naming(index, streams):
                streams = as_streams(block(*streams, **context))
        return torch.cat(streams, self.split_dim) if isinstance(x, Tensor) else streams

    @overload
    def __getitem__(self, index: slice) -> ReversibleSequence: ...
    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    def __getitem__(self, index: slice | int) -> nn.Module:
        if isinstance(index, slice):
            return ReversibleSequence(list(self)[index], self.split_dim)
        block: nn.Module = super().__getitem__(index)
        return block

    def extra_repr(self) -> str:
        return f"split_dim={self.split_dim}"

    # The engine draws its dropout masks eagerly in both runs; compiled, the forward pass would draw others.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, x: Tensor | Streams, context: dict[str, Any], inverse: bool) -> Any:
        streams = self._split(x)
        join = self.split_dim if isinstance(x, Tensor) else None
        blocks = list(enumerate(self))
        tape = Tape() if _engine_applies() else None
        for index, block in reversed(blocks) if inverse else blocks:
            with self._naming(index, streams):
                if tape is not None:
                    streams = through(tape, block, inverse, streams, context)
                else:
                    streams = as_streams((block.inverse if inverse else block)(*streams, **context))  # type: ignore[operator]
        if tape is not None:
            return anchor(tape, streams, join)
        return streams if join is None else torch.cat(streams, join)

    def _split(self, x: Tensor | Streams) -> Streams:
        if isinstance(x, Tensor):
            if not -x.dim() <= self.split_dim < x.dim():
                raise ValueError(
                    f"ReversibleSequence splits dimension {self.split_dim}; the input has shape {tuple(x.shape)}"
                )
            if x.shape[self.split_dim] % 2:
                raise ValueError(
                    f"ReversibleSequence splits dimension {self.split_dim} in halves; it has {x.shape[self.split_dim]} entries, "
                    f"an odd number, in an input of shape {tuple(x.shape)}. Unshuffle or pad the input first, or pass a tuple "
                    f"of streams"
                )
            x = x.chunk(2, self.split_dim)
        elif not (isinstance(x, tuple) and x and all(isinstance(s, Tensor) for s in x)):
            raise TypeError(f"ReversibleSequence takes a tensor or a tuple of streams; got a {type(x).__name__}")
        # A dense copy: both runs of a conditioner shall see the same strides (clone keeps channels_last).
        return tuple(s if s.is_contiguous() else s.clone() for s in x)

    @contextmanager
    def _naming(self, index: int, streams: Streams) -> Iterator[None]:
        """Errors of a block say which block, and what it was given."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as error:
            if type(error) not in (RuntimeError, TypeError, ValueError):  # out of memory, say: its type is its meaning
                raise
            shapes = ", ".join(str(tuple(s.shape)) for s in streams)
            where = f"block {index} ({type(self[index]).__name__}), given streams of shapes {shapes}"
            raise type(error)(f"{where}: {error}") from error


def _engine_applies() -> bool:
    """Whether to rebuild activations in the backward pass, or to run the blocks as ordinary modules: without gradients, as
    part of another chain's rerun, and under forward-mode differentiation and torch.func's transforms, which need graphs."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.is_grad_enabled() and not (is_recomputing() or transformed or forward_mode)
