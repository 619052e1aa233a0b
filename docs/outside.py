"""A hook of mkdocs: pages outside of docs/ join the site, at the place that they have in the repository.

A link is written as the repository wants it, [budget-cpu.md](../bench/results/budget-cpu.md) on a page of docs/, and so works
wherever the repository is browsed. In the site docs/ is the root: links that leave a page's folder are written anew for that. And
where a link's text is a file's name, readers of the site, who see no files, get the page's heading.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
RESULTS = [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / "bench" / "results").glob("*.md"))]
OUTSIDE = [*RESULTS, "CHANGELOG.md"]


def on_config(config: MkDocsConfig) -> None:
    config.nav += [{"Results": RESULTS}, {"Changes": "CHANGELOG.md"}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    name = page.file.src_uri
    folder = posixpath.dirname(name if name in OUTSIDE else f"docs/{name}")

    def in_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[0])).removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(name))

    def headed(link: re.Match[str]) -> str:
        return f"[{_heading(ROOT / folder / link[1])}]({link[1]}"

    markdown = re.sub(r"\[[\w./-]+\.md\]\(([\w./-]+\.md)", headed, markdown)
    return re.sub(r"(?<=\]\()\.\./[^)#]+", in_site, markdown)


def _heading(page: Path) -> str:
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
