"""A hook of mkdocs that adds pages outside of docs/ to the site, under their paths in the repository.

Links are relative to the repository, such as [budget-cpu.md](../bench/results/budget-cpu.md) on a page of docs/, and work when
the repository is browsed. The site's root is docs/: the hook rewrites links that leave a page's folder. A link whose text is the
name of a file gets the page's heading, because readers of the site do not see files. A comment
<!-- help: fit --> becomes the help of that command.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
RESULTS = [
    page.relative_to(ROOT).as_posix()
    for page in sorted((ROOT / "bench" / "results").glob("*.md"))
]
PROJECT = ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
OUTSIDE = [*RESULTS, *PROJECT]

PUBLICATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "tool"
]["publication"]


def on_config(config: MkDocsConfig) -> None:
    config.repo_url = PUBLICATION["repository"] or None
    config.site_url = PUBLICATION["site"] or None
    tabs = {name: pages for entry in config.nav for name, pages in entry.items()}
    tabs["Benchmarks"].append({"Raw results": RESULTS})
    tabs["Project"][1:1] = PROJECT


def on_files(files: Files, config: MkDocsConfig) -> None:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    name = page.file.src_uri
    if name in OUTSIDE:
        page.meta["search"] = {"boost": 0.01}  # behind the pages that explain
    folder = posixpath.dirname(name if name in OUTSIDE else f"docs/{name}")

    def in_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0])).removeprefix(
            "docs/"
        )
        return posixpath.relpath(target, posixpath.dirname(name))

    def headed(link: re.Match[str]) -> str:
        return f"[{_heading(ROOT / folder / link[1])}]({link[1]}"

    markdown = re.sub(
        r"<!-- help: (.*?) -->", lambda found: _help(found[1]), markdown
    )
    markdown = re.sub(r"\[[\w./-]+\.md\]\(([\w./-]+\.md)", headed, markdown)
    return re.sub(r"(?<=\]\()(?:\.\./|docs/)[^)#]+", in_site, markdown)


def _help(command: str) -> str:
    """The options of a command of crevnet, as a block of code."""
    sys.path[:0] = [str(ROOT), str(ROOT / "models")]
    try:
        from crevnet.cli import main

        text = io.StringIO()
        os.environ["COLUMNS"] = "100"
        with redirect_stdout(text), suppress(SystemExit):
            main([*command.split(), "--help"])
        return f"```text\n{text.getvalue()}```"
    finally:
        del sys.path[:2], os.environ["COLUMNS"]


def _heading(page: Path) -> str:
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
