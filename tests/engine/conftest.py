"""What tests of several files share."""

import pytest

from engine.ranks import Ranks
from revflow._budget.costs import Choice
from revflow._budget.keeper import Keeper


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes, which live until all tests are done."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture
def keep_from(monkeypatch):
    """keep_from(k) makes every sequence with a budget store its blocks from the number k on, once it has measured;
    keep_from(k, outputs) also the outputs of the conditioners of those earlier blocks."""

    def keep(k, outputs=()):
        choice = Choice(k, frozenset(outputs))
        option = lambda self, order, device: self._menus[order[-1]].menu.option(choice)  # noqa: E731
        monkeypatch.setattr(Keeper, "_option", option)

    return keep


@pytest.fixture(autouse=True)
def free_hooks(monkeypatch):
    """The networks of these tests are so small that the hooks of a stored output would cost more than it saves."""
    monkeypatch.setattr("revflow._budget.costs.HOOKS", 0)
