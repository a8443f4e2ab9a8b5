"""Rules of the house that no linter knows: who imports whom, sizes of files and functions, what must not appear."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "headway"
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
NATIVE_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40

# Room -> the rooms it may import from (its own is always allowed). Arrows point one way: docs/architecture.md.
LEAVES = {"errors", "fields"}
RECORDS = LEAVES | {"config", "request", "outputs"}
SHAPES = {"models.config", "models.caches", "engine.batch"}  # plain records that several rooms pass on
COMPILED = {"_core", "_cpu", "_cuda"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "fields": {"errors"},
    "config": LEAVES,
    "request": LEAVES,
    "files": {"errors"},
    "loop": set(),
    "outputs": LEAVES | {"request"},
    "models.config": set(),
    "models.caches": {"models.config", "ops"},
    "engine.batch": {"ops"},
    "_core": set(),
    "_cpu": set(),
    "_cuda": set(),
    "text": {"errors", "files"},
    "ops": {"errors"} | COMPILED,
    "layers": {"errors", "ops"} | SHAPES,
    "models": {"errors", "files", "ops", "layers"} | SHAPES,
    "sampling": {"files", "ops", "engine.batch", "_core"} | RECORDS,
    "engine": {"models", "sampling", "text", "ops"} | COMPILED | SHAPES | RECORDS,
    "llm": {"engine", "sampling", "text", "models"} | SHAPES | RECORDS,
    "server.client": {"text"} | RECORDS,
    "server": {"", "loop", "text", "server.client"} | RECORDS,
    "aio": {"engine", "text", "server.client"} | SHAPES | RECORDS,
    "remote": {"loop", "text", "server.client"} | RECORDS,
    "remote.__main__": {"remote", "aio"},
    "": {"llm", "aio"} | RECORDS,
    "cli": {"", "llm", "aio", "engine", "models", "server", "remote"} | COMPILED | SHAPES | RECORDS,
    "__main__": {"cli"},
}


def room_of(module: str) -> str:
    """headway.engine.batch.X -> engine.batch; headway.layers.norm -> layers; headway -> the empty name."""
    parts = module.split(".")[1:]
    two = ".".join(parts[:2])
    if two in MAY_IMPORT:
        return two
    one = ".".join(parts[:1])
    is_module = (PACKAGE / one).is_dir() or any(PACKAGE.glob(f"{one}.py*"))
    return one if is_module else ""


def module_of(path: Path) -> str:
    parts = ["headway", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Every headway module that the file imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "headway")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "headway":
            is_package = node.module == "headway" or (PACKAGE / Path(*node.module.split(".")[1:])).is_dir()
            yield from (f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=ids)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(module_of(path))
    allowed = MAY_IMPORT[room] | {room}
    wrong = sorted({m for m in imported_modules(parse(path)) if room_of(m) not in allowed})
    assert not wrong, f"{ids(path)} ({room}) must not import {wrong}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=ids)
def test_imports_are_absolute(path: Path) -> None:
    assert not [n for n in ast.walk(parse(path)) if isinstance(n, ast.ImportFrom) and n.level], ids(path)


@pytest.mark.parametrize("path", PYTHON_FILES + NATIVE_FILES, ids=ids)
def test_a_file_is_one_idea(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{ids(path)} has {num_lines} lines, at most {MAX_FILE_LINES}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=ids)
def test_a_function_is_one_thought(path: Path) -> None:
    """Lines of the body: a signature of many tensors and the docstring do not count."""
    long = [
        f"{node.name}: {num_lines}"
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for num_lines in [num_body_lines(node)]
        if num_lines > MAX_FUNCTION_LINES
    ]
    assert not long, f"{ids(path)}: functions over {MAX_FUNCTION_LINES} lines: {long}"


def num_body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    last_line_before = (first.end_lineno or 0) if is_docstring else first.lineno - 1
    return (node.end_lineno or 0) - last_line_before


@pytest.mark.parametrize("path", PYTHON_FILES, ids=ids)
def test_exported_names_are_sorted(path: Path) -> None:
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            names = ast.literal_eval(node.value)
            assert names == sorted(names, key=all_order), ids(path)


def all_order(name: str) -> tuple[int, str]:
    """ruff's order of __all__: constants, classes, the rest."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


CALLS_THAT_RUN_DATA = {"eval", "exec", "compile", "__import__"}
MODULES_THAT_RUN_DATA = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
TORCH_CALLS_THAT_RUN_DATA = {("torch", "load"), ("torch", "compile")}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=ids)
def test_nothing_runs_what_it_read(path: Path) -> None:
    """No pickle, no eval: a checkpoint is data."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in CALLS_THAT_RUN_DATA, f"{ids(path)}:{node.lineno}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in TORCH_CALLS_THAT_RUN_DATA, f"{ids(path)}:{node.lineno}"
        elif isinstance(node, ast.Import):
            assert not MODULES_THAT_RUN_DATA & {a.name.split(".")[0] for a in node.names}, (
                f"{ids(path)}:{node.lineno}"
            )
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES_THAT_RUN_DATA, (
                f"{ids(path)}:{node.lineno}"
            )


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", NATIVE_FILES, ids=ids)
def test_no_native_file_includes_torch(path: Path) -> None:
    wrong = [name for name in included(path) if re.match(r"(torch|ATen|c10|caffe2)/", name)]
    assert not wrong, f"{ids(path)} includes {wrong}"


def test_no_kernel_reads_behind_a_wait_what_the_compiler_may_read_before_it() -> None:
    """ptxas moves ld.global.nc, which __ldg is, ahead of griddepcontrol.wait: a prompt's first columns were then read
    before the kernel ahead had written them. One function has it, for what no kernel before it writes."""
    found = {
        p.name for p in NATIVE_FILES if re.search(r'"ld\.global\.nc|__ldg\(|__restrict__', p.read_text())
    }
    assert found == {"vector.cuh"}
    users = {p.name for p in NATIVE_FILES if "load_once<" in p.read_text()}
    assert users == {"attention_leaf.cuh", "skinny_linear.cu"}  # one is not chained, the other reads weights


@pytest.mark.parametrize(
    "path", [p for p in NATIVE_FILES if p.parent.name in {"core", "cpu", "params"}], ids=ids
)
def test_the_core_knows_neither_python_nor_cuda(path: Path) -> None:
    wrong = [name for name in included(path) if re.search(r"^(Python\.h|pybind11/|cuda)", name)]
    assert not wrong, f"{ids(path)} includes {wrong}"


TEXT_SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".cmake", ".toml", ".yaml", ".md", ".txt", ""}
ROOMS = ["csrc", "python", "tests", "bench", "docs", "examples", "cmake"]
TEXT_FILES = [
    path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*"))
    if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts
] + [p for p in sorted(ROOT.iterdir()) if p.is_file() and p.suffix in TEXT_SUFFIXES and p.name != ".git"]


def test_no_file_names_the_machine_it_was_written_on() -> None:
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users|tmp|farm)/\w")
    found = [
        f"{ids(path)}:{number}"
        for path in TEXT_FILES
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, found


def test_the_version_is_written_once() -> None:
    """pyproject.toml reads it from the package."""
    version = re.search(r'^__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert version is not None
    found = [
        ids(p)
        for p in TEXT_FILES
        if p.suffix in {".py", ".toml", ".txt", ".cmake"} and version[1] in p.read_text()
    ]
    assert found == ["python/headway/__init__.py"], found
