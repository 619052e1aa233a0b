"""Scheduled sampling: training that passes from true frames to the model's own predictions.

Bengio et al. 2015, https://arxiv.org/abs/1506.03099, with a linear decay; PredRNN is trained so (Wang et al. 2017, NeurIPS).
"""

from __future__ import annotations

import numpy as np


def fed_frames(count: int, steps: int, step: int, seed: int) -> list[bool]:
    """For each of `count` future frames, whether the true one is fed to the model in the optimizer's step number `step`.

    Each is with a probability that falls linearly from 1 at step 0 to 0 at step `steps`, independently of the others. It
    follows from the seed and the step alone, so that a resumed run draws the same.
    """
    probability = max(0.0, 1 - step / steps) if steps else 0.0
    return (np.random.default_rng((seed, step)).random(count) < probability).tolist()
