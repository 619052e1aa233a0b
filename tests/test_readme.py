"""The README's Python runs as written, and the files it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    names = {}
    for example in examples:
        exec(example, names)
    printed = capsys.readouterr().out
    reversible, plain = map(float, re.findall(r"kept ([\d.]+)", printed))
    assert reversible < plain / 10
    assert "no problem found" in printed


def test_named_files_exist():
    names = re.findall(r"`((?:tests|bench|docs)/[\w./-]+)`|\]\(((?:bench|docs|tests)/[^)]+)\)", README)
    assert names
    for name in {a or b for a, b in names}:
        assert (ROOT / name).exists(), name
