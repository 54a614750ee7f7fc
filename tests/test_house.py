"""The rules of the house: who imports whom, what an import costs, what an `__init__` may hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dpnc", "tiers", "prefetch")
FORBIDDEN = {
    "tiers": {"dpnc", "prefetch"},
    "prefetch": {"dpnc", "tiers"},
    "dpnc.kernels": {"tiers", "prefetch"},
}
ALLOWED = {("dpnc.kernels.jit", "tiers.compiled")}
HEAVY = {"numba", "zarr", "river", "torch", "matplotlib", "skimage", "PIL"}
LINES_MAX = 600


def modules():
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree, name, is_package):
    """Return every module that a tree imports anywhere, relative ones resolved against `name`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")
                kept = len(parents) - node.level + (1 if is_package else 0)
                base = ".".join([*parents[:kept], *([base] if base else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def is_inside(name, package):
    return name == package or name.startswith(package + ".")


def direction_violations(source, name, is_package=False):
    """Return the imports of a module that point the wrong way."""
    imports = imported_names(ast.parse(source), name, is_package)
    return sorted(
        imported
        for owner, targets in FORBIDDEN.items()
        if is_inside(name, owner)
        for imported in imports
        if any(is_inside(imported, target) for target in targets)
        and not any(name == owner and is_inside(imported, target) for owner, target in ALLOWED)
    )


def assigned_names(node):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def init_violations(source):
    """Return the statements of an `__init__` that do more than re-export.

    Allowed are a docstring, imports (also under ``if TYPE_CHECKING``), dunder and private constants
    that feed a lazy ``__getattr__``, and the functions ``__getattr__`` and ``__dir__``.
    """
    body = ast.parse(source).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    found = []
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            statements = [*node.body, *node.orelse]
            if all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in statements):
                continue
        if isinstance(node, ast.Assign | ast.AnnAssign):
            names = assigned_names(node)
            if names and all(name.startswith("_") for name in names):
                continue
        if isinstance(node, ast.FunctionDef) and node.name in {"__getattr__", "__dir__"}:
            continue
        found.append(ast.unparse(node).splitlines()[0])
    return found


def has_too_many_lines(source):
    return len(source.splitlines()) > LINES_MAX


def heavy_modules(importtime_log):
    """Return the heavy packages in the output of ``python -X importtime``."""
    imported = {line.rsplit("|", 1)[-1].strip() for line in importtime_log.splitlines()}
    return sorted(HEAVY & {name.split(".")[0] for name in imported})


def import_log(statement):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stderr


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_one_way(path):
    name, is_package = module_name(path), path.name == "__init__.py"
    assert direction_violations(path.read_text(), name, is_package) == []


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_a_module_is_short(path):
    assert not has_too_many_lines(path.read_text())


@pytest.mark.parametrize(
    "path", [path for path in modules() if path.name == "__init__.py"], ids=module_name
)
def test_an_init_only_re_exports(path):
    assert init_violations(path.read_text()) == []


@pytest.mark.parametrize("module", ["dpnc", "dpnc.cli"])
def test_importing_loads_nothing_heavy(module):
    assert heavy_modules(import_log(f"import {module}")) == []


def test_every_package_is_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_constraints_are_exact_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        name, version = line.split("==")
        assert name and version[0].isdigit(), line


@pytest.mark.parametrize(
    ("source", "name", "is_package"),
    [
        ("import dpnc", "tiers.store", False),
        ("import dpnc.field as field", "tiers.store", False),
        ("from dpnc import errors", "tiers.policies.clock", False),
        ("import prefetch", "tiers", True),
        ("def f():\n    from tiers import errors", "prefetch.plan", False),
        ("from tiers.store import Store", "dpnc.kernels.grid", False),
        ("from ...tiers import store", "dpnc.kernels.grid", False),
        ("from tiers.compiled import Compiler", "dpnc.kernels.grid", False),
        ("from tiers.store import Store", "dpnc.kernels.jit", False),
        ("import tiers", "dpnc.kernels.jit", False),
    ],
)
def test_an_import_the_wrong_way_is_caught(source, name, is_package):
    assert direction_violations(source, name, is_package)


@pytest.mark.parametrize(
    ("source", "name", "is_package"),
    [
        ("import tiers, prefetch", "dpnc.field", False),
        ("from tiers import errors", "tiers.store", False),
        ("from . import errors", "tiers", True),
        ("import tiersmith", "prefetch.plan", False),
        ("from tiers.compiled import Compiler", "dpnc.kernels.jit", False),
    ],
)
def test_an_import_the_right_way_is_not(source, name, is_package):
    assert direction_violations(source, name, is_package) == []


@pytest.mark.parametrize(
    "source",
    [
        "def create(): ...",
        "class Field: ...",
        "x = 1",
        "import os\nos.environ['A'] = 'b'",
        "if True:\n    import numba",
        "for name in ():\n    pass",
        "if TYPE_CHECKING:\n    x = 1",
    ],
)
def test_an_init_that_does_something_is_caught(source):
    assert init_violations(source)


def test_a_long_module_is_caught():
    assert has_too_many_lines("pass\n" * (LINES_MAX + 1))
    assert not has_too_many_lines("pass\n" * LINES_MAX)


@pytest.mark.parametrize("module", sorted(HEAVY))
def test_a_heavy_import_is_caught(module):
    log = f"import time:       100 |        200 |   {module}.core\n"
    assert heavy_modules(log) == [module]


def test_a_heavy_import_is_caught_in_a_real_log():
    assert heavy_modules(import_log("import PIL")) == ["PIL"]
