"""The order in which training sees its windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochShuffle(Sampler[int]):
    """Another order of `count` windows each epoch, the same in a resumed run: it follows from the seed and the epoch.

    With `variants` of each window, such as mirror images, one of them is drawn: an epoch holds `count` of the items 0 to
    variants * count - 1, item `n * count + i` being variant `n` of window `i`.
    """

    def __init__(self, count: int, seed: int, variants: int = 1) -> None:
        self._count, self._seed, self._variants, self._epoch = count, seed, variants, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(self._count, generator=generator)
        variants = torch.randint(self._variants, (self._count,), generator=generator)
        return iter((order + self._count * variants).tolist())

    def __len__(self) -> int:
        return self._count
