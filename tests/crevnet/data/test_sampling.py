"""The loader that goes on within an epoch."""

from itertools import chain

import pytest

from crevnet.data.files.days import open_day
from crevnet.data.sampling import EpochShuffle, window_loader
from crevnet.data.windows import Windows


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_without_reading_what_was_used(workers, points, write_day, tmp_path):
    windows = Windows([open_day(write_day(tmp_path, points(0)))], 5)

    def loader():
        made = window_loader(windows, 3, workers, EpochShuffle(len(windows), seed=1))
        made.batch_sampler.sampler.set_epoch(4)
        return made

    first = loader()
    batches, states = [], []
    for batch in first:
        batches.append(batch["start"].tolist())
        states.append(first.state_dict())
    assert sorted(chain.from_iterable(batches)) == list(range(16)) and len(batches) == len(first) == 6
    second = loader()
    second.load_state_dict(states[1])
    seen, item = [], Windows.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windows, "__getitem__", lambda windows, i: seen.append(i) or item(windows, i))
        assert [batch["start"].tolist() for batch in second] == batches[2:]
    assert seen == ([] if workers else list(chain.from_iterable(batches[2:])))  # workers have lists of their own
    assert [batch["start"].tolist() for batch in second] == batches  # the next epoch is whole
