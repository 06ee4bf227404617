"""What the installed diffusers library says of its classes, read off its source: nothing of it is imported.

A planner has no torch, and importing a pipeline class would import it. So signatures, base classes and methods are
parsed. Refuses to know which argument means what. Standard library only.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vidgen.errors import ConfigError

ROOMS = ("pipelines", "models", "schedulers", "loaders", "configuration_utils.py")
"""Where the library keeps what we ask about; the other folders hold unfinished copies and stand-ins."""
OWN = Path(__file__).parent / "recipes"
"""Our own pipeline classes, built on those of the library."""
SCALARS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a call. `kind` is its scalar type as far as annotation and default tell, else None. `default` is
    its value where that is a literal; `known` tells whether it is, `required` that there is none. `choices` are the
    values that a `Literal` lists, () for any."""

    name: str
    kind: type | None
    default: Any = None
    known: bool = True
    required: bool = False
    choices: tuple[Any, ...] = ()


def version() -> str:
    """The installed diffusers; ConfigError naming the extra where there is none."""
    found = re.search(r'^__version__ = "([^"]+)"', (_root() / "__init__.py").read_text(encoding="utf-8"), re.M)
    return found.group(1) if found else ""


def call(name: str, where: str) -> tuple[Argument, ...]:
    """The arguments of a pipeline class's `__call__`. ConfigError (starting with `where`) if there is no such class."""
    return _arguments(*_method(name, "__call__", where))


def components(name: str, where: str) -> dict[str, bool]:
    """What a pipeline class is made of, in order: argument of `__init__` -> whether it can do without."""
    optional = _attribute(name, "_optional_components") or []
    takes = _arguments(*_method(name, "__init__", where))
    modules = [a for a in takes if a.kind is None]
    return {a.name: not a.required or a.name in optional for a in modules}


def method(name: str, wanted: str) -> tuple[Argument, ...] | None:
    """The arguments of a method of a class, its base classes included; None if it has none of that name."""
    found = _find_method(name, wanted)
    return None if found is None else _arguments(*found)


def initial(name: str) -> tuple[Argument, ...]:
    """The arguments a class (a scheduler, a model) is made with; () for a class that the library does not have."""
    return method(name, "__init__") or ()


def exists(name: str) -> bool:
    return name in _index()


def own_file(name: str) -> Path | None:
    """The file of one of our own pipeline classes; None for the library's."""
    path = _index().get(name)
    return path if path is not None and path.parent == OWN else None


def constants(name: str) -> dict[str, Any]:
    """What a class's `__init__` assigns to attributes of `self`: the literal values, and None for what is computed."""
    found = _find_method(name, "__init__")
    lines = [] if found is None else [node for node in ast.walk(found[0]) if isinstance(node, ast.Assign)]
    return {
        target.attr: _literal(line.value, None)[1]
        for line in lines
        for target in line.targets
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }


def members(name: str) -> tuple[str, ...]:
    """Names of an enumeration."""
    found = _class(name)
    lines = [] if found is None else [node for node in found[0].body if isinstance(node, ast.Assign)]
    return tuple(target.id for line in lines for target in line.targets if isinstance(target, ast.Name))


def names(ending: str) -> list[str]:
    """Names of all classes that end so, sorted."""
    return sorted(name for name in _index() if name.endswith(ending) and not name.startswith("_"))


# ---------------------------------------------------------------- finding


@functools.cache
def _root() -> Path:
    found = importlib.util.find_spec("diffusers")  # finds a top-level package without importing it
    if found is None or found.origin is None:
        raise ConfigError(
            "model.family: diffusers needs the diffusers library, which is not installed; "
            "pip install 'vidgen[diffusers]'"
        )
    return Path(found.origin).parent


@functools.cache
def _index() -> dict[str, Path]:
    """Class -> file, the first in the order of ROOMS and names; our own recipes before all."""
    found: dict[str, Path] = {}
    places = [OWN, *(_root() / room for room in ROOMS)]
    for place in places:
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            for match in re.finditer(r"^class (\w+)", path.read_text(encoding="utf-8"), re.M):
                found.setdefault(match.group(1), path)
    return found


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _class(name: str) -> tuple[ast.ClassDef, ast.Module] | None:
    path = _index().get(name)
    if path is None:
        return None
    tree = _tree(path)
    return next((node, tree) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _lineage(name: str) -> Iterator[tuple[ast.ClassDef, ast.Module]]:
    """A class and its base classes, depth first, as far as the library's own go."""
    found = _class(name)
    if found is None:
        return
    yield found
    for base in found[0].bases:
        if isinstance(base, ast.Name):
            yield from _lineage(base.id)


def _find_method(name: str, wanted: str) -> tuple[ast.FunctionDef, ast.Module] | None:
    for tree, module in _lineage(name):
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == wanted:
                return node, module
    return None


def _method(name: str, wanted: str, where: str) -> tuple[ast.FunctionDef, ast.Module]:
    if not exists(name):
        close = get_close_matches(name, names("Pipeline") + _own(), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{where}: {name!r} is not a class of diffusers {version()}{hint}")
    found = _find_method(name, wanted)
    if found is None:
        raise ConfigError(f"{where}: {name} of diffusers {version()} is not a pipeline: it has no {wanted}")
    return found


def _own() -> list[str]:
    return [name for name in _index() if own_file(name)]


def _attribute(name: str, wanted: str) -> Any:
    """The literal value of a class attribute, or None."""
    for tree, _ in _lineage(name):
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == wanted for t in node.targets):
                known, value = _literal(node.value, None)
                return value if known else None
    return None


# ---------------------------------------------------------------- reading


def _arguments(function: ast.FunctionDef, module: ast.Module | None = None) -> tuple[Argument, ...]:
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    defaults += given.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return tuple(_argument(arg, default, module) for arg, default in pairs if arg.arg not in ("self", "cls"))


def _argument(arg: ast.arg, default: ast.expr | None, module: ast.Module | None) -> Argument:
    choices = _choices(arg.annotation)
    kind = type(choices[0]) if choices else _kind(arg.annotation)
    if default is None:
        return Argument(arg.arg, kind, required=True, choices=choices)
    known, value = _literal(default, module)
    if arg.annotation is None and type(value) in SCALARS.values():
        kind = type(value)
    return Argument(arg.arg, kind, value, known, choices=choices)


def _choices(annotation: ast.expr | None) -> tuple[Any, ...]:
    """The values of a `Literal[...]`."""
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.value, ast.Name):
        return ()
    known, values = _literal(annotation.slice, None)
    if annotation.value.id != "Literal" or not known:
        return ()
    return values if isinstance(values, tuple) else (values,)


def _literal(node: ast.expr, module: ast.Module | None) -> tuple[bool, Any]:
    """(whether it is one, the value) of an expression: a literal, or the name of a constant of the same file."""
    try:
        return True, ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Name) and module is not None:
        for line in module.body:
            if isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == node.id for t in line.targets):
                return _literal(line.value, None)
    return False, None


def _kind(annotation: ast.expr | None) -> type | None:
    """The scalar of an annotation: `int | None`, `Optional[int]`, `float | list[float]`; float wins over int."""
    found = set(_members(annotation))
    if {"int", "float"} <= found:
        return float
    return next((SCALARS[name] for name in ("str", "float", "bool", "int") if name in found), None)


def _members(annotation: ast.expr | None) -> Iterator[str]:
    """Names of the members of a union, not of what a container holds."""
    if isinstance(annotation, ast.Name):
        yield annotation.id
    elif isinstance(annotation, ast.BinOp):
        yield from _members(annotation.left)
        yield from _members(annotation.right)
    elif isinstance(annotation, ast.Subscript):
        outer = annotation.value.id if isinstance(annotation.value, ast.Name) else ""
        if outer in ("Optional", "Union"):
            inner = annotation.slice
            for member in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                yield from _members(member)
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _members(ast.parse(annotation.value, mode="eval").body)
