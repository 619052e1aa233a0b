"""What tests of several files share."""

import pytest

from engine.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes, which live until all tests are done."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()
