"""The repository's tests that are marked for CUDA, by pytest, within a time limit: rows per file and per failure."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gpu_stages.stage import Row, Setup

ROOT = Path(__file__).parents[2]
LIMIT = 75
"""Seconds."""
RESULT = re.compile(r"^(\S+?\.py)::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py\S*)(?: - (.*))?$", re.MULTILINE)


def rows(setup: Setup) -> Iterable[Row]:
    """In toy size the tests of one file."""
    limit = min(LIMIT, setup.seconds_left - 5)
    files = [Path("tests/engine/memory/test_memory.py")] if setup.toy else [*marked()]
    text, is_late, status = printed(files, setup.work / "pytest.log", limit)
    yield from per_file(text)
    failures = dict(FAILURE.findall(text))
    yield from ({"failed_test": test, "note": reason} for test, reason in failures.items())
    if is_late:
        yield {"tests": "cuda", "note": f"out of time: stopped after {limit:.0f} s"}
        raise TimeoutError(f"the tests took more than {limit:.0f} s")
    if status:
        last = text.strip().splitlines()[-1:] or ["nothing printed"]
        raise AssertionError(f"pytest ended with exit status {status}: {last[0]}")


def marked() -> Iterable[Path]:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.cuda" in text or "cpu_and_cuda" in text:
            yield path.relative_to(ROOT)


def printed(files: Iterable[Path], log: Path, limit: float) -> tuple[str, bool, int | None]:
    """pytest's output, whether it was stopped, and its exit status. It has none of the options of pyproject.toml, which name
    plugins."""
    options = ["-m", "cuda", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return log.read_text(encoding="utf-8", errors="replace"), True, None
    return log.read_text(encoding="utf-8", errors="replace"), False, process.returncode


def per_file(text: str) -> Iterable[Row]:
    found: dict[str, Counter[str]] = {}
    for file, result in RESULT.findall(text):
        found.setdefault(file, Counter())[result] += 1
    for file, counts in found.items():
        yield {
            "tests": file,
            "passed": counts["PASSED"] + counts["XFAIL"],
            "failed": counts["FAILED"] + counts["ERROR"] + counts["XPASS"],
            "skipped": counts["SKIPPED"],
        }
