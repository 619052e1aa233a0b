"""Mutated files of every sort that is read: one line or the honest values, without a traceback, a hang, or gigabytes.

CREVNET_FUZZ says how many files (`make fuzz`), CREVNET_FUZZ_SEED from which seed on.
"""

import os
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
from apart import apart
from fuzzed import mutated, readers

from crevnet.data.errors import DataError
from crevnet.machine.errors import SettingsError

FILES = int(os.environ.get("CREVNET_FUZZ", "400"))
SEED = int(os.environ.get("CREVNET_FUZZ_SEED", "0"))
AT_ONCE = 25
SAID = (DataError, SettingsError, OSError)  # which the command line prints in one line


@pytest.fixture(scope="module")
def honest(run, points, write_day, tmp_path_factory):
    pytest.importorskip("hdf5plugin")
    root = tmp_path_factory.mktemp("fuzzed")
    return readers(root, shutil.copytree(run, root / "run"), points, write_day)


def outcome(reader, expected):
    """What came of reading it: an error, the same, or something else."""
    try:
        found = reader.read()
    except SAID as error:
        line = str(error)
        return "error" if line and "\n" not in line else f"not one line: {line!r}"
    except ValueError as error:  # which only settings raise, for the command line to print
        return "error" if reader.path.name == "dates.txt" and "\n" not in str(error) else repr(error)
    if expected is None:
        return "same"
    same = found.shape == expected.shape and found.dtype == expected.dtype and np.array_equal(found, expected)
    return "same" if same else "other values"


def tried(reader, expected, content, seeds, log):
    outcomes = Counter()
    for seed in seeds:
        log.write_text(str(seed))
        reader.path.write_bytes(mutated(content, np.random.default_rng(seed)))
        found = outcome(reader, expected)
        assert found in ("error", "same", "other values"), (seed, found)
        outcomes[found] += 1
    return outcomes


def test_mutated_files(honest, tmp_path):
    share = -(-FILES // len(honest))
    outcomes, log = {}, tmp_path / "seed"
    for name, reader in honest.items():
        content, expected = reader.path.read_bytes(), reader.read()
        outcomes[name] = Counter()
        for first in range(0, share, AT_ONCE):
            seeds = [SEED + seed for seed in range(first, min(first + AT_ONCE, share))]
            try:
                ended = apart(lambda: tried(reader, expected, content, seeds, log), seconds=30, mebibytes=1024)  # noqa: B023
            except AssertionError as error:
                raise AssertionError(f"{name}, seed {log.read_text()}: {error}") from error
            finally:
                reader.path.write_bytes(content)
            outcomes[name] += ended.result
            assert not ended.err
        assert outcomes[name]["other values"] <= int(reader.silent * share), (name, outcomes[name])
    sys.stdout.write("".join(f"{name}: {dict(found)}\n" for name, found in outcomes.items()))  # for `make fuzz`
    assert sum(found.total() for found in outcomes.values()) >= FILES
