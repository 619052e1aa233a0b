"""The prose keeps the field's words and a technical writer's syntax: mechanical rules, each a pattern and its remedy.

Pages are read as sentences, without code and the targets of links; Python files by their comments, docstrings and messages,
without the code of examples.
"""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COUNTED = (
    "sample|step|block|value|layer|stream|second|day|batch|window|frame|sequence|line|channel|cell|city|device|pass"
)
RULES = {
    rf"(?:\b(?:one|two|three|once|twice|times|values?|bytes?|[KMG]i?B|evaluations?|frames|rows?)|\d) an? (?:{COUNTED})\b": "per",
    r"\bre-?buil[dt]\w*|\brebuilding": "recompute",
    r"\bre(?:runs?|ran|running|wind|winds|wound)\b": "recompute, invert",
    r"\bun(?:do|does|did|done|doing)\b": "invert",
    r"\bordinary\b|\bplain (?:autograd|back)|\bplain's\b": "standard autograd",
    r"\b(?:asks|asked|wants|wanted|says|tells|told|knows|stands?|stood)\b": "no personification: name what happens",
    r"\bsees to it\b|\blooks? after\b|\bmind(?:s|ed)\b": "no personification: name what happens",
    r"\bbeside\b": "compared with, alongside, in addition to",
    r"\balone\b": "only, in front of what it limits",
    r"\b(?:has|have|had|having) to\b": "must, required",
    r"(?<!here )\b(?:is|are|was|were) no (?!longer|more than)": "is not a",
    r"\bfrugal": "memory-efficient",
    r"\bkept\b": "stored",
    r"\bslots? of memory\b|\bpart(?:ed|s|ing)? (?:by|among|into)\b": "split",
    r"\bmovies?\b": "video",
    r"\bchains?\b(?! rule)": "module stack, sequence",
    r"\bforecasts? that needs? no training|\bnaive forecasts?": "naive baseline",
    r"(?:^|(?<=[.!?] ))What (?![^.?]*\?)": "no bare relative subject: name the thing",
    r"(?:^|(?<=[.!?:;] ))(?:Where|where) (?![^.?]*\?)|\b(?:only|except) where\b": "if, when",
    r"\b\d[\d.]* times (?:ordinary|standard|that|the|as)\b": "1.38×",
    r"\bshall\b|\banew\b|\bnobody\b|\bfor the time being\b|\bso to speak\b": "plain words of today",
    r"\bgo(?:es)? on\b|\bwent on\b": "continue",
    r"\bcomes? of it\b|\bput(?:s|ting)? (?:it |one )?to (?:the|a part)\b|\btakes? the place of\b": "say what happens",
    r", (?:say|too)[,.;)]": "for example; also",
    r"\bwhatever\b|\bhowever long\b": "any, all",
    r"\bneeds? (?:it|them) not\b|\bnot any ?more\b": "does not need",
    r"\b(?:Below|On it|Of these|In it) (?:stand|come|may|is|are)\b": "subject first",
    r";[^;]*;": "one claim per sentence: no chain of semicolons",
}
WORDS = 25  # of a sentence, at most
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md"]
PAGES += [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ["revflow", "models", "bench", "examples"]


def sentences(markdown):
    """Of a page, with `code` as one word. Cells of tables and headings are sentences of their own."""
    text = re.sub(r"^```.*?^```|<!--.*?-->|\$\$.*?\$\$|^:::.*?$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!?\[(.*?)\]\((?:[^()]|\([^()]*\))*\)", lambda link: link[1], text, flags=re.DOTALL)
    text = re.sub(r"`[^`]+`", "`code`", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-|#>]|\d+\.) ?)", text):
        if block.lstrip().startswith("|"):
            pieces = block.strip().strip("|").split("|")
        else:
            pieces = [re.sub(r"^[\s#>]*(?:[-*] |\d+\. )?", "", block)]
        for piece in pieces:
            plain = " ".join(re.sub(r"[*_]{1,2}(?=\S)|(?<=\S)[*_]{1,2}", "", piece).split())
            yield from re.split(r"(?<=[.!?])[)\"]? (?=[\"(`A-Z0-9]|revflow|crevnet|\w+\.md)", plain)


def comments(code):
    """Of a Python file, with lines that follow one another as one."""
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            above = lines.pop(token.start[0] - 1, "")
            lines[token.start[0]] = f"{above} {token.string.lstrip('# ')}".strip()
    return lines.values()


def messages(code):
    """Sentences of comments, docstrings and literals of several words, of a Python file."""
    for comment in comments(code):
        yield from sentences(comment)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") > 2:
            yield from sentences(re.sub(r"^ *(?:>>>|\.\.\.) .*", "", inspect.cleandoc(node.value), flags=re.MULTILINE))


def findings(text):
    """What a sentence does against the rules, each as the words found and the remedy."""
    for pattern, remedy in RULES.items():
        yield from (f"{found[0]!r}: {remedy}" for found in re.finditer(pattern, text))


def of_page(page):
    markdown = (ROOT / page).read_text(encoding="utf-8")
    for sentence in sentences(markdown):
        yield from (f"{finding} | {sentence}" for finding in findings(sentence))
        if len(re.findall(r"\S*\w\S*", sentence)) > WORDS:
            yield f"more than {WORDS} words | {sentence}"
    for header in re.findall(r"^(\|.*\|)\n\|[-:| ]+\|$", markdown, re.MULTILINE):
        if not all(cell.strip() for cell in header.strip("|").split("|")):
            yield f"an empty heading of a table | {header}"


def of_folder(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for text in messages(path.read_text(encoding="utf-8")):
            yield from (f"{path.relative_to(ROOT)}: {finding} | {text[:120]}" for finding in findings(text))


@pytest.mark.parametrize("place", [*PAGES, *FOLDERS])
def test_prose(place):
    found = [*(of_folder if place in FOLDERS else of_page)(place)]
    assert not found, f"{len(found)} in {place}:\n" + "\n".join(found)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


PLANTED = """One value a sample is rebuilt. The engine knows it. It has to be a tuple, beside the others.
Where it is large, split it. What goes in is F. Only `rebuild()` is code; two are fine; three are not.

| | heading |
|---|---|
| a cell alone | is no tuple |
"""


def test_planted_faults_are_found(monkeypatch, tmp_path):
    (tmp_path / "page.md").write_text(PLANTED + " ".join(["long"] * 26) + ".\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    found = "\n".join(of_page("page.md"))
    for remedy in [
        "per",
        "recompute",
        "personification",
        "must",
        "compared",
        "if, when",
        "relative",
        "semicolons",
        "only",
    ]:
        assert remedy in found
    assert "is not a" in found and "more than 25" in found and "empty heading" in found and "rebuild()" not in found


def test_good_prose_is_not_found():
    text = "Pass F, not the block. There is no cache. `kept` bytes per sample are 1.38× as many. Where is it stored?"
    assert not [finding for sentence in sentences(text) for finding in findings(sentence)]


def test_code_of_an_example_is_not_prose():
    example = '"""Return the sum.\n\n    >>> plan.kept, plan.ordinary\n    ... # kept\n    It was kept.\n    """\n'
    assert [finding for sentence in messages(example) for finding in findings(sentence)] == ["'kept': stored"]
