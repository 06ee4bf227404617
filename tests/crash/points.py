"""Every fault point of the package, read off its source: nobody keeps a list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "vidgen"
STORE = {"create", "put", "put_file", "delete"}
"""What changes a store, of `vidgen.store.objects.Objects`."""
OWN = ("store/objects.py", "pack/")
"""Where these verbs themselves are written; and what writes to a place of its own, which can be made again from the run
at any time."""


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def _called(node: ast.AST, name: str) -> ast.expr | None:
    """The argument of `faults.name(...)`, if that is what the node is."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != name:
        return None
    return node.args[0] if isinstance(node.func.value, ast.Name) and node.func.value.id == "faults" else None


def _texts(argument: ast.expr) -> list[str]:
    """Its literals: one, or those of a choice between two."""
    if isinstance(argument, ast.IfExp):
        return _texts(argument.body) + _texts(argument.orelse)
    assert isinstance(argument, ast.Constant) and isinstance(argument.value, str), "a point's name is a literal"
    return [argument.value]


@cache
def by_file() -> dict[str, list[str]]:
    """File below the package -> the points that it reaches."""
    found: dict[str, list[str]] = {}
    for file, tree in _trees():
        for node in ast.walk(tree):
            if (argument := _called(node, "reached")) is not None:
                found.setdefault(file, []).extend(_texts(argument))
            elif (argument := _called(node, "around")) is not None:
                names = [f"{text}.{side}" for text in _texts(argument) for side in ("before", "after")]
                found.setdefault(file, []).extend(names)
    return found


def all_points() -> list[str]:
    return sorted({point for points in by_file().values() for point in points})


def bare_acts() -> list[str]:
    """Calls that change the store and stand outside every `with faults.around(...)`: file:line."""
    found: list[str] = []
    for file, tree in _trees():
        if file.startswith(OWN):
            continue
        stack: list[tuple[ast.AST, bool]] = [(tree, False)]
        while stack:
            node, covered = stack.pop()
            if isinstance(node, ast.With):
                covered = covered or any(_called(item.context_expr, "around") is not None for item in node.items)
            if _changes_the_store(node) and not covered:
                assert isinstance(node, ast.Call)
                found.append(f"{file}:{node.lineno}")
            stack += [(child, covered) for child in ast.iter_child_nodes(node)]
    return sorted(found)


def _changes_the_store(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = node.func.value
    name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return node.func.attr in STORE | {"probe", "now"} and name.lstrip("_") in ("objects", "root")
