import pytest


@pytest.fixture(autouse=True)
def _default_allocator(monkeypatch):
    """The scripts' allocator would keep all memory that later tests of this process free."""
    monkeypatch.setattr("kit.host_allocator.keep_freed_memory", lambda: None)
