"""A folder is a permission: who may import whom, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "vidgen").rglob("*.py"))
}
LAYERS = [
    {"cli", "jobs", "__main__"},
    {"scheduled"},
    {"fleet"},
    {"pack"},
    {"report"},
    {"demo"},
    {"manifest"},
    {"parity"},
    {"plan", "engine", "loop"},
    {"store", "prompts"},
    {"models"},
    {"conditioning"},
    {"media"},
    {"config", "where", "identity", "nn", "sampling", "text", "checkpoint", "memory", "placement"},
    {"config_rules", "formats", "redaction", "tokens", "parallel", "family", "specs", "device", "residency"},
    {"types", "errors", "faults"},
]
"""Rooms from top to bottom; a room imports itself and what is below it."""
HEADLESS = (
    "config",
    "faults",
    "types",
    "prompts",
    "tokens",
    "plan",
    "memory",
    "placement",
    "where",
    "identity",
    "store",
    "manifest",
    "pack",
    "family",
    "specs",
    "conditioning",
    "errors",
)
"""Rooms that run where there is no GPU: no torch, not even through others."""

FLEET_ON_THE_HEAD = ("driver", "dispatch", "progress", "cluster", "observer", "metrics", "exporter")


@cache
def imports(module: str, lazy: bool) -> frozenset[str]:
    """What a module imports: at import time, or (`lazy`) anywhere, annotations-only imports left out."""
    tree = ast.parse(MODULES[module].read_text())
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack += node.orelse
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        stack += list(ast.iter_child_nodes(node))
    return frozenset(found)


@cache
def closure(module: str) -> frozenset[str]:
    """Everything that importing a module imports, ours followed, others by their top-level name."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        for target in imports(name, lazy=False):
            found = target if target in MODULES else target.split(".")[0] if not target.startswith("vidgen") else None
            if found is not None and found not in seen:
                seen.add(found)
                if found in MODULES:
                    todo.append(found)
    return frozenset(seen)


def outside(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module, lazy=True) if not name.startswith("vidgen")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def layer(name: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_down(module: str) -> None:
    if module == "vidgen":
        assert not imports(module, lazy=True)
        return
    for target in imports(module, lazy=True):
        if target in MODULES and target not in ("vidgen", "vidgen.models", module) and room(target) != room(module):
            assert layer(room(module)) <= layer(room(target)), f"{module} imports {target}"


def test_every_room_has_its_layer() -> None:
    assert {room(module) for module in MODULES if module != "vidgen"} <= set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_only_what_touches_the_cluster_imports_ray(module: str) -> None:
    if module not in {f"vidgen.fleet.{name}" for name in ("cluster", "actors", "nodes", "exporter")}:
        assert "ray" not in outside(module)


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) not in ("fleet", "cli")])
def test_nothing_below_the_fleet_reaches_ray(module: str) -> None:
    assert "ray" not in closure(module)


@pytest.mark.parametrize(
    "module",
    [
        module
        for module in MODULES
        if room(module) in HEADLESS
        or module.endswith(".spec")
        or module in {f"vidgen.fleet.{name}" for name in FLEET_ON_THE_HEAD}
        or room(module) == "cli"
    ],
)
def test_planning_and_driving_need_no_torch(module: str) -> None:
    assert not {"torch", "transformers", "diffusers"} & closure(module)


@pytest.mark.parametrize("module", [m for m in MODULES if m.endswith(".spec")])
def test_a_spec_needs_the_standard_library_alone(module: str) -> None:
    ours = {"vidgen.types", "vidgen.errors", "vidgen.specs", "vidgen"}
    for name in closure(module):
        own = name.rsplit(".", 1)[0] in (module.rsplit(".", 1)[0], "vidgen.specs")
        assert name in ours or own or name in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("vidgen.models.")])
def test_a_family_never_imports_another(module: str) -> None:
    family = module.split(".")[2]
    for target in imports(module, lazy=True):
        if target.startswith("vidgen.models."):
            assert target.split(".")[2] == family


def test_the_folders_of_families_say_nothing_of_themselves() -> None:
    for path in (ROOT / "vidgen" / "models").rglob("__init__.py"):
        assert path.read_text() == ""


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("omegaconf", {"vidgen.config"}),
        ("transformers", {"vidgen.text"}),
        ("imageio_ffmpeg", {"vidgen.media"}),
        ("diffusers", {"vidgen.parity"}),
    ],
)
def test_a_library_has_one_importer(library: str, allowed: set[str]) -> None:
    users = {module for module in MODULES if library in outside(module)}
    free = (*(f"{room}." for room in allowed), "vidgen.models.diffusers", "vidgen.demo")
    assert {user for user in users if not user.startswith(free)} <= allowed


def test_no_file_is_named_for_nothing_in_particular() -> None:
    banned = {"utils", "helpers", "common", "base", "manager"}
    assert not [module for module in MODULES if module.rsplit(".", 1)[-1] in banned]


def test_importing_everything_changes_nothing() -> None:
    """No environment switch, no thread, no logging handler, no folder made, no CUDA query."""
    program = """
import importlib, logging, os, sys, threading
import torch, transformers, ray, rich, jinja2
environment, threads = dict(os.environ), threading.active_count()
handlers, here = list(logging.root.handlers), os.listdir()
for name in sys.argv[1:]:
    importlib.import_module(name)
theirs = {"RAY_CLIENT_MODE", "TORCHINDUCTOR_CACHE_DIR"}  # set by ray and torch themselves when parts are imported
changed = {key for key, _ in set(os.environ.items()) ^ set(environment.items())} - theirs
assert not changed, changed
assert threading.active_count() == threads, "threads"
assert logging.root.handlers == handlers, "logging"
assert os.listdir() == here, "files"
assert not torch.cuda.is_initialized(), "cuda"
"""
    names = [name for name in MODULES if not name.endswith("__main__")]
    result = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
