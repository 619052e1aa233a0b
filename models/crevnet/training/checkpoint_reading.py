"""Reads and verifies the checkpoints of a run, which `checkpoints.py` writes."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from crevnet.data.errors import DataError
from crevnet.machine.files import quoted
from crevnet.networks.config import ModelConfig
from crevnet.networks.models import make_network
from crevnet.networks.video_model import VideoModel


def checkpoint_path(folder: Path, which: str) -> Path:
    """The path of the "best" or the "last" checkpoint of the run in `folder`."""
    return folder / "checkpoints" / f"{which}.ckpt"


def load_checkpoint(folder: Path, which: str) -> dict[str, Any]:
    """The "best" or the "last" checkpoint of the run in `folder`, on the CPU. DataError if it is missing or damaged."""
    path = checkpoint_path(folder, which)
    if not path.is_file():
        if checkpoint_path(folder, "last").is_file():
            raise DataError(
                f"{path} does not exist, because no epoch has ended: use --checkpoint last, or --resume {quoted(folder)}"
            )
        raise DataError(f"{path} does not exist: train first with crevnet fit --out {quoted(folder)}")
    try:
        _check_sums(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        dict(checkpoint["state_dict"])
    except Exception as error:  # a damaged file fails in many ways
        other = checkpoint_path(folder, "last" if which == "best" else "best").name
        reason = str(error) if isinstance(error, _DamagedError) else type(error).__name__
        raise DataError(
            f"{path} is not a readable checkpoint ({reason}): copy {other} over it, or train again"
        ) from error
    return checkpoint


class _DamagedError(Exception):
    """A checkpoint differs from what was written."""


def _check_sums(path: Path) -> None:
    """Refuse a checkpoint that has changed since it was written, because PyTorch would load its weights silently.

    Also refuse compressed entries: PyTorch never writes any, and would decompress them to any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _DamagedError("its entries are compressed, expected an uncompressed file of crevnet fit")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, ValueError) as error:
        raise _DamagedError(f"it is damaged: {' '.join(str(error).split())}") from error
    if damaged is not None:
        raise _DamagedError(f"it is damaged: the checksum of {damaged!a} does not match")


def load_network(folder: Path, model: ModelConfig, which: str) -> VideoModel[Any]:
    """The trained network of the run in `folder`, from its "best" or "last" checkpoint, on the CPU."""
    network = make_network(model)
    _load_weights(network, load_checkpoint(folder, which), checkpoint_path(folder, which))
    return network


def resumable_steps(folder: Path, model: ModelConfig) -> int:
    """The number of optimizer steps before last.ckpt. DataError if training cannot resume from it."""
    checkpoint, path = load_checkpoint(folder, "last"), checkpoint_path(folder, "last")
    missing = {"loops", "optimizer_states", "order", "random", "best"} - checkpoint.keys()
    if missing:
        raise DataError(
            f"{path} contains weights, but not {', '.join(sorted(missing))}, which resuming requires: train again"
        )
    _load_weights(make_network(model), checkpoint, path)
    steps: int = checkpoint["global_step"]
    return steps


def _load_weights(network: VideoModel[Any], checkpoint: dict[str, Any], path: Path) -> None:
    try:
        network.load_state_dict({k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()})
    except RuntimeError as error:
        raise DataError(
            f"{path} contains weights of another architecture, expected this {network.config.title}: use the model settings "
            "of the run that trained them"
        ) from error
