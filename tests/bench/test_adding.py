"""The benchmark that CONTRIBUTING.md writes: one file, which runs and writes its rows and its page."""

import json
import re
import runpy
import sys

from documents import ROOT


def test_the_benchmark_of_the_page(monkeypatch, tmp_path, capsys):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page[page.index("## Add a benchmark") :]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    script, rows, written = (tmp_path / name for name in ("channels.py", "rows.json", "channels.md"))
    script.write_text(code, encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", [str(script), "--channels", "8", "16", "--json", str(rows), "--markdown", str(written)]
    )
    runpy.run_path(str(script), run_name="__main__")
    small, large = json.loads(rows.read_text())
    assert (small["channels"], large["channels"]) == (8, 16)
    assert all(row["reversible"] < row["standard"] for row in (small, large)) and small["standard"] < large["standard"]
    text = written.read_text()
    assert "- command: `python bench/channels.py --channels 8 16" in text
    assert f"| 16 | {large['standard']} | {large['reversible']} |" in text and text in capsys.readouterr().out
