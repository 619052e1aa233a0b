"""The addresses in pyproject.toml reach the package's metadata and the site. Before publication, nothing links to them."""

import runpy
import sys
from pathlib import Path

import pytest
import setuptools
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent
REPOSITORY, SITE = "https://example.org/us/revflow", "https://us.example.org/revflow/"


@pytest.fixture(params=[("", ""), (REPOSITORY, SITE)], ids=["unpublished", "published"])
def copy(request, tmp_path):
    """A copy of the files that know the addresses, and the addresses."""
    repository, site = request.param
    for name in ["setup.py", "pyproject.toml", "README.md", "mkdocs.yml", "docs/outside.py"]:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text.replace('repository = ""', f'repository = "{repository}"').replace('site = ""', f'site = "{site}"')
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path, repository, site


def test_metadata(copy, monkeypatch):
    folder, repository, _ = copy
    monkeypatch.setattr(setuptools, "setup", lambda **given: metadata.update(given))
    monkeypatch.setattr(setuptools, "find_packages", lambda *_, **__: [])
    metadata = {}
    runpy.run_path(str(folder / "setup.py"))
    if not repository:
        assert metadata["project_urls"] == {}
        assert metadata["long_description"] == (ROOT / "README.md").read_text(encoding="utf-8")
        return
    assert metadata["project_urls"]["Source"] == repository
    text = metadata["long_description"]
    assert f"]({repository}/raw/main/docs/images/memory-depth.png)" in text
    assert f"[Get started]({repository}/blob/main/docs/get-started.md)" in text
    assert "](docs/" not in text and "](bench/" not in text and "](https://arxiv.org/abs/1910.11577)" in text


def test_site(copy, monkeypatch):
    folder, repository, site = copy
    monkeypatch.delitem(sys.modules, "outside", raising=False)
    config = load_config(str(folder / "mkdocs.yml"), strict=False)
    config = config.plugins.on_config(config)
    assert config.repo_url == (repository or None) and config.site_url == (site or None)
