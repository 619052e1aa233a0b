"""Scheduled sampling: training inputs change gradually from true frames to the model's own predictions.

The source is Bengio et al. 2015, https://arxiv.org/abs/1506.03099, with a linear decay. PredRNN is trained in this way (Wang et
al. 2017, NeurIPS).
"""

from __future__ import annotations

import numpy as np


def fed_frames(count: int, steps: int, step: int, seed: int) -> list[bool]:
    """For each of `count` future frames, whether the true frame is the model's input in optimizer step `step`.

    The probability falls linearly from 1 at step 0 to 0 at step `steps`, independently for each frame. The draw depends only on
    the seed and the step, so a resumed run repeats it.
    """
    probability = max(0.0, 1 - step / steps) if steps else 0.0
    drawn: list[bool] = (np.random.default_rng((seed, step)).random(count) < probability).tolist()
    return drawn
