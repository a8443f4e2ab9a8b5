"""What README and docs say is so: code blocks run or are excerpts; flags, metrics, paths and variables exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from headway.cli.main import build_parser
from headway.cli.parser import Parser, parse
from tests.pages import PAGES, ROOT, Block, all_blocks, blocks, python_blocks, run_python

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
EXCERPTS = {"docs/adding_a_model.md": "python/headway/models/families/llama.py"}
RUN_ELSEWHERE = {"docs/serving.md": "tests/server/test_serving_page.py"}  # against a live server
# Flags of other people's programs.
FOREIGN_FLAGS = {"--no-build-isolation", "--no-deps", "--strict"}
FOREIGN_VARIABLES = {"PYTHONPATH"}  # passed on to a process of ours


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def command_id(words: list[str]) -> str:
    return " ".join(words)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {block.kind for page in PAGES for block in blocks(page)}
    assert kinds <= {"python", "commands", "picture", "yaml"}, kinds
    pictures = [
        block for block in all_blocks("picture") if re.search(r"^\s*(headway|pip) ", block.text, re.MULTILINE)
    ]
    assert not pictures, pictures


@pytest.mark.parametrize("page", sorted({block.page for block in all_blocks("python")}))
def test_python_runs_or_is_an_excerpt(page: str, tmp_path: Path) -> None:
    if page in RUN_ELSEWHERE:
        assert page in (ROOT / RUN_ELSEWHERE[page]).read_text()
        return
    for source in python_blocks(page):
        if page in EXCERPTS:
            check_excerpt(source, (ROOT / EXCERPTS[page]).read_text())
        else:
            run_python(source, tmp_path)


def check_excerpt(source: str, whole: str) -> None:
    """Its lines stand there in this order; `...` stands for what is left out."""
    place = 0
    for line in source.splitlines():
        if line.strip() not in ("", "..."):
            place = whole.find(line, place)
            assert place >= 0, line


COMMANDS = [words for block in all_blocks("commands") for words in block.commands]
OURS = [words[words.index("headway") :] for words in COMMANDS if "headway" in words]


@pytest.mark.parametrize("words", OURS, ids=command_id)
def test_a_command_line_is_one_that_parses(words: list[str]) -> None:
    assert parse(build_parser(), words[1:]).run


def test_other_commands_name_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    extras = PYPROJECT["project"]["optional-dependencies"]
    for words in COMMANDS:
        text = " ".join(words)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, text
        assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(extras), text
        if words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words if "/" in word), text


def test_what_make_installs_is_a_list_in_pyproject() -> None:
    """As make reads it: an argument ends at a comma."""
    arguments = re.findall(r"^\t@?\$\(call install,([^,\n]*).*\)$", MAKEFILE, re.MULTILINE)
    assert len(arguments) == MAKEFILE.count("$(call install,") - 1  # the comment's
    for argument in arguments:
        packages = eval(argument.replace("$(TORCH)", "torch==2.11"), {"p": PYPROJECT})
        assert packages
        assert all(isinstance(package, str) for package in packages), argument


def test_extras_that_the_code_and_the_pages_name_are_there() -> None:
    named = set(re.findall(r"headway\[(\w+)\]", sources() + all_pages()))
    assert {"serve", "bench", "otel"} <= named
    assert named <= set(PYPROJECT["project"]["optional-dependencies"])


def test_readme_lists_the_extras_of_users() -> None:
    (line,) = re.findall(r"^Extras, .*?\n\n", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    extras = set(PYPROJECT["project"]["optional-dependencies"]) - {"test", "dev", "eval"}
    assert set(re.findall(r"`(\w+)` \(", line)) == extras


RUNNABLE = {("headway", "generate"), ("headway", "doctor")}
SLOW = {("headway", "bench")}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=command_id(words), marks=pytest.mark.long if tuple(words[:2]) in SLOW else ())
        for words in OURS
        if tuple(words[:2]) in RUNNABLE | SLOW
    ],
)
def test_a_command_line_runs(words: list[str], tmp_path: Path) -> None:
    """As it stands, but for shapes as large as a GPU, which need another machine."""
    if "--nvtx" in words or any("9b" in word for word in words):
        assert parse(build_parser(), words[1:]).run
        return
    if words[1:3] == ["bench", "serve"]:
        run_beside_a_server(words, tmp_path)
    else:
        run_headway(words, tmp_path)


def run_headway(words: list[str], folder: Path) -> None:
    words = [str(ROOT / word) if word.startswith("bench/") else word for word in words[1:]]
    command = [sys.executable, "-m", "headway", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def run_beside_a_server(words: list[str], folder: Path) -> None:
    """On its port, with fewer and shorter prompts."""
    pytest.importorskip("starlette")
    from tests.server.fake_engine import FakeEngine
    from tests.server.live import live

    with live(FakeEngine()) as server:
        size = ["--num-prompts", "5", "--random-input-len", "16", "--random-output-len", "4"]
        run_headway([*words, "--port", str(server.port), *size], folder)


def test_what_a_scraper_is_told_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    (block,) = all_blocks("yaml")
    (job,) = yaml.safe_load(block.text)["scrape_configs"]
    assert set(job) == {"job_name", "authorization", "static_configs"}
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]


def test_every_result_is_named_and_every_one_named_is_there() -> None:
    """On a page, or by what writes it: a file that nobody names has been superseded."""
    log = (ROOT / "docs" / "log.md").read_text()
    writers = [path.read_text() for room in ("bench", "tests") for path in (ROOT / room).rglob("*.py")]
    text = "\n".join([all_pages(), log, *writers])
    results = {path.name for path in (ROOT / "bench" / "results").iterdir()}
    assert {name for name in results if name not in text} == set()
    assert set(re.findall(r"(?<![\w*])\w+_h200\.json", text)) - {"recorded_vllm_h200.json"} <= results


def all_pages() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def sources() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "python" / "headway").rglob("*.py")))


def all_flags(parser: Parser) -> set[str]:
    found = set(parser.flags)
    for inner in parser.subparsers.values():
        found |= all_flags(inner)
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_flag_is_there(page: Path) -> None:
    """Of a command of ours, of a script of ours, or of a program that is named in FOREIGN_FLAGS."""
    own = "\n".join(path.read_text() for room in ("bench", "examples", ".ci") for path in (ROOT / room).rglob("*")
                    if path.suffix in (".py", ".cpp", "") and path.is_file())  # fmt: skip
    flags = all_flags(build_parser()) | FOREIGN_FLAGS | set(re.findall(r"--[a-z][a-z-]+", own))
    text = re.sub(r"\]\([^)]*\)|<!--.*?-->", "", page.read_text())
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - flags
    assert not unknown


def test_every_metric_is_there() -> None:
    metrics = pytest.importorskip("headway.server.metrics")
    vllm_metrics = pytest.importorskip("headway.server.metrics_vllm")
    names = {m.sample for m in (*metrics.METRICS, *vllm_metrics.VLLM_METRICS)}
    histograms = {m.name for m in metrics.METRICS if m.kind in ("histogram", "summary")}
    names |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")} | histograms
    for page in PAGES:
        named = set(re.findall(r"`(headway_[a-z_]+)|`(vllm:[a-z0-9_]+)", page.read_text()))
        unknown = (
            {one or other for one, other in named} - names - {"headway_checks", "headway_fuzz", "headway_sim"}
        )
        assert not unknown, (page.name, unknown)


def test_every_path_of_the_server_is_there() -> None:
    endpoints = pytest.importorskip("headway.server.endpoints")
    paths = {endpoint.path.replace(":path", "") for endpoint in endpoints.ENDPOINTS} | {"/v1"}
    for page in PAGES:
        named = set(re.findall(r"`(/[a-z0-9_/{}.]*)`", page.read_text()))
        assert named <= paths, (page.name, named - paths)


def variables_read() -> set[str]:
    """Variables of the environment that Python of ours reads by name, and those of the build."""
    found: set[str] = set()
    for path in (ROOT / "python" / "headway").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Call, ast.Subscript)) and "environ" in ast.unparse(node):
                words = re.findall(r"(?:environ(?:\.get)?[\[(])['\"](\w+)", ast.unparse(node))
                found |= set(words)
    from headway.cli.flags import API_KEY_VARIABLE

    defines = PYPROJECT["tool"]["scikit-build"]["cmake"]["define"].values()
    return (found | {API_KEY_VARIABLE} | {define["env"] for define in defines}) - FOREIGN_VARIABLES


def test_every_variable_of_the_environment_is_told_and_every_one_told_is_read() -> None:
    text, read = all_pages(), variables_read()
    assert {"HEADWAY_DEVICE", "HEADWAY_CUDA_ARCHS"} <= read
    for name in read:
        assert f"`{name}`" in text, f"{name} is on no page"
    build = (
        "\n".join(p.read_text() for p in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()]) + MAKEFILE
    )
    for name in set(re.findall(r"`((?:HEADWAY|OPENAI|TORCH)_[A-Z_]+)`", text)):
        assert name in read or name in build, f"{name} is read by nobody"


def test_the_checks_would_see_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_excerpt("a = 1\nb = 2\n", "b = 2\na = 1\n")
    with pytest.raises(AssertionError):
        run_python("print('x')\nraise SystemExit(3)", tmp_path)
    with pytest.raises(SystemExit):
        parse(build_parser(), ["generate", "x", "--no-such-flag"])
    block = Block("x.md", "commands", "HEADWAY_DEVICE=cpu pip install .  # comment\nmake \\\n  test\n")
    assert block.commands == [["pip", "install", "."], ["make", "test"]]
