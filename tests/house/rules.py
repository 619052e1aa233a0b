"""The rules of the house, as functions from a source file to what breaks them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("revflow", "models", "bench", "examples")

# The files that pass a sequence of blocks, forward and backward: without its micro-batches, its stored outputs and its repr.
PRIVATE_TORCH = "revflow/_base/torch_private.py", "revflow/_base/torch_capture.py"

CORE = (
    "revflow/bijection.py",
    "revflow/coupling.py",
    "revflow/sequence.py",
    "revflow/_base/errors.py",
    "revflow/_base/second_derivative.py",
    "revflow/_base/stepwise.py",
    "revflow/_base/streams.py",
    "revflow/_base/torch_private.py",
    "revflow/_replay/mode.py",
    "revflow/_replay/replay.py",
    *sorted(
        f"revflow/_rewind/{file.name}"
        for file in (ROOT / "revflow/_rewind").glob("*.py")
        if file.stem not in ("skeleton", "slices")
    ),
)

LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 300, 40, 6


@dataclass(frozen=True)
class Source:
    """One file of Python."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def is_engine(self) -> bool:
        return self.name.startswith("revflow/")

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return [*ast.walk(ast.parse(self.text))]

    @property
    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Functions and methods, each with its name, behind its class's."""
        owners = {
            id(child): f"{node.name}." for node in self.nodes if isinstance(node, ast.ClassDef) for child in node.body
        }
        for node in self.nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{owners.get(id(node), '')}{node.name}", node

    @property
    def imports(self) -> Iterator[tuple[str, str]]:
        """(module, name) of each import; the name is empty where the whole module is imported."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((node.module, alias.name) for alias in node.names)


def sources() -> list[Source]:
    return [Source(path) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def long_files(source: Source) -> Iterator[str]:
    if len(source.text.splitlines()) > LONGEST_FILE:
        yield source.name


def long_functions(source: Source) -> Iterator[str]:
    for name, node in source.functions:
        if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
            yield f"{source.name} {name}"


def wide_functions(source: Source) -> Iterator[str]:
    """Functions of more parameters than one can read; keyword-only ones are named by whoever passes them."""
    for name, node in source.functions:
        own = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        if len(own) > MOST_PARAMETERS:
            yield f"{source.name} {name}"


def private_torch(source: Source) -> Iterator[str]:
    """Names of torch that may change with any release: the files in `PRIVATE_TORCH` are the place for them."""
    if source.name in PRIVATE_TORCH:
        return
    dotted = {".".join(_path(node)) for node in source.nodes if isinstance(node, ast.Attribute)}
    dotted |= {f"{module}.{name}" for module, name in source.imports}
    if any(d.startswith("torch.") and _is_private(d) for d in dotted):
        yield source.name


def hidden_engine(source: Source) -> Iterator[str]:
    """What takes from revflow another name than those of its `__init__`."""
    if not source.is_engine:
        for module, name in source.imports:
            if module.startswith("revflow.") or (module == "revflow" and name.startswith("_")):
                yield f"{source.name} {module}.{name}".rstrip(".")


def others_private_attributes(source: Source) -> Iterator[str]:
    """Attributes with an underscore that no class or function of this file defines."""
    if source.name in PRIVATE_TORCH:
        return
    defined = {name.rpartition(".")[2] for name, _ in source.functions}
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, (ast.Name, ast.Attribute)):
            defined.add(node.target.id if isinstance(node.target, ast.Name) else node.target.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            defined.add(node.value)  # of __slots__
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            path = _path(node)
            if node.attr not in defined and path[0] not in ("self", "cls", "torch") and not _is_torchs(node.attr):
                yield f"{source.name} {node.attr}"


def foreign_imports(source: Source) -> Iterator[str]:
    """What the engine imports beside torch and the standard library."""
    if source.is_engine:
        for module, _ in source.imports:
            root = module.partition(".")[0]
            if root not in ("torch", "revflow", "__future__") and root not in sys.stdlib_module_names:
                yield f"{source.name} {root}"


def code_lines(source: Source) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    lines: set[int] = set()
    docstrings = {
        id(node.value) for node in source.nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in source.nodes:
        if isinstance(node, (ast.stmt, ast.expr, ast.arg)) and id(node) not in docstrings:
            if isinstance(node, ast.Expr) and id(node.value) in docstrings:
                continue
            lines |= {node.lineno} if isinstance(node, ast.stmt) else {node.lineno, node.end_lineno or node.lineno}
    return len(lines)


def core_lines() -> int:
    """Code lines of the core. The aim is 1,500, which a reader manages in a day."""
    return sum(code_lines(Source(ROOT / name)) for name in CORE)


def _path(node: ast.expr) -> list[str]:
    """`a.b.c` as its names; an expression that is no name counts as an empty one."""
    if isinstance(node, ast.Attribute):
        return [*_path(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def _is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def _is_torchs(attribute: str) -> bool:
    """Of tensors, modules, named tuples and argparse; and a function that `sys` documents."""
    return attribute in {
        "_asdict", "_backward_hooks", "_buffers", "_cdata", "_compiled_call_impl", "_current_frames", "_fields", "_forward_hooks",
        "_forward_pre_hooks", "_make", "_modules", "_parameters", "_replace", "_saved_tensors", "_version",
    }  # fmt: skip
