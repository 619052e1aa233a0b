"""The Python of the README and of docs/ runs as written and prints what stands below it, and the files they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {page.name: page for page in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}
pages = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
EXAMPLES = {name: page for name, page in PAGES.items() if "```python" in page.read_text(encoding="utf-8")}


def run_examples(page, capsys):
    """Run a page's Python in one namespace; returns all that it printed."""
    examples = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", page.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    names, everything = {}, ""
    for source, expected in examples:
        exec(source, names)
        printed = capsys.readouterr().out
        if expected:
            assert printed.split() == expected.split()  # pages break long lines
        everything += printed
    return everything


@pytest.mark.parametrize("page", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_python_examples_run(page, capsys):
    printed = run_examples(page, capsys)
    if page == README:
        reversible, plain = map(float, re.findall(r"kept ([\d.]+)", printed))
        assert reversible < plain / 10
        assert "no problem found" in printed


@pages
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    names = [ROOT / name for name in re.findall(r"`((?:tests|bench|docs)/[\w./-]+)`", text)]
    names += [page.parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert names
    for name in names:
        assert name.exists(), name
