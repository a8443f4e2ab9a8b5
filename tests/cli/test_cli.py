"""The `headway` command as a user types it: a process of its own, its two streams and its exit code."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway import __version__
from headway.cli.flags import given_settings, parse_size
from headway.cli.main import build_parser
from headway.cli.parser import parse
from headway.config import EngineConfig
from headway.fields import flag, specs

SMALL = ("--device", "cpu", "--max-model-len", "256")


def headway(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headway", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def imported_modules(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return {name.partition(".")[0] for name in result.stderr.split()}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["bench", "latency", "--help-all"],
        ["bench", "serve", "--help"],
    ],
)
def test_help_and_version_import_neither_torch_nor_numpy(words: list[str]) -> None:
    modules = imported_modules(f"from headway.cli import main; main({words!r})")
    assert "headway" in modules
    assert not {"torch", "numpy", "tokenizers"} & modules


def test_importing_headway_does_not_import_torch() -> None:
    assert "torch" not in imported_modules("import headway; headway.SamplingParams(); headway.EngineConfig()")


def test_version() -> None:
    result = headway("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"headway {__version__}")


def test_every_setting_is_a_flag_of_every_engine_command() -> None:
    commands = build_parser().subparsers
    kinds = commands["bench"].subparsers
    for command in (
        commands["generate"],
        commands["chat"],
        *(kinds[k] for k in ("latency", "throughput", "startup")),
    ):
        flags = command.flags
        assert {flag(setting) for setting in specs(EngineConfig)} <= set(flags)


def test_advanced_flags_are_listed_on_demand() -> None:
    for shows_all in (False, True):
        text = build_parser(shows_all=shows_all).subparsers["generate"].format_help()
        assert ("--block-size" in text) == shows_all
        assert "--model" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--temprature", "1"], "did you mean --temperature?"),
        (["generate", "x", "--temperature", "3"], "temperature must be a number in [0, 2]"),
        (["generate", "x", "--temperature", "nan"], "temperature must be"),
        (["generate", "x", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["generate", "x", "--mamba-cache-gb", "nan"], "'nan' is not a number of gigabytes"),
        (
            ["generate", "x", "--mamba-cache-gb", "-1"],
            "snapshot_memory_bytes (--snapshot-memory-bytes) must be",
        ),
        (["generate", "x", "--structured-outputs", "[a-z]"], "is not JSON"),
        (["generate", "x", "--structured-outputs", "[1]"], "is not a JSON object"),
        (["generate", "x", "--allowed-token-ids", "a"], "--allowed-token-ids"),
        (["chat", "--url", "localhost:8000"], "--url must be such as"),
        (["chat", "--url", "http://localhost:8000", "--dtype", "float32"], "cannot go with --url"),
        (["chat", "--model-name", "x"], "--model-name goes with --url"),
        (["generate", "x", "--max_num_seqs", "many"], "--max-num-seqs"),
        (["generate", ""], "prompt must be"),
        (["bench", "--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["bench", "serve", "--request-rat", "2"], "did you mean --request-rate?"),
        (["bench", "srve"], "invalid choice"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    result = headway(*words)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_model_is_one_line_and_exit_code_4(tmp_path: Path) -> None:
    result = headway("generate", "x", "--model", str(tmp_path / "nowhere"))
    assert result.returncode == 4
    assert len(result.stderr.strip().splitlines()) == 1


def test_too_little_memory_is_exit_code_3() -> None:
    result = headway("generate", "x", "--device", "cpu", "--cpu-memory-bytes", "1MiB")
    assert result.returncode == 3
    assert "--cpu-memory-bytes" in result.stderr


def test_generate_prints_text_on_stdout_and_speed_on_stderr() -> None:
    words = ("generate", *SMALL, "--max-tokens", "12", "--temperature", "0")
    argument, piped = headway(*words, "def fib(n):"), headway(*words, stdin="def fib(n):")
    echoed = headway(*words, "def fib(n):", "--echo", "--quiet")
    assert argument.returncode == piped.returncode == echoed.returncode == 0, argument.stderr
    assert argument.stdout == piped.stdout
    assert len(argument.stdout) > 5
    assert echoed.stdout == "def fib(n):" + argument.stdout
    assert echoed.stderr == ""
    assert "tokens/s" in argument.stderr
    assert len(argument.stderr.splitlines()) == 1


def test_generate_keeps_to_a_form_and_to_tokens() -> None:
    pytest.importorskip("llguidance")
    words = ("generate", "x", *SMALL, "--quiet", "--max-tokens", "20")
    formed = headway(*words, "--structured-outputs", '{"regex": "[a-c]{4}"}')
    assert re.fullmatch("[a-c]{4}\n", formed.stdout), formed.stderr
    among = headway(*words, "--allowed-token-ids", "5", "--allowed-token-ids", "6", "--ignore-eos")
    assert set(among.stdout) == {"!", '"', "\n"}, among.stderr


def test_generate_repeats_with_its_seed() -> None:
    words = (
        "generate",
        "import ",
        *SMALL,
        "--max-tokens",
        "16",
        "--quiet",
        "--ignore-eos",
        "--temperature",
        "1",
    )
    outputs = [headway(*words, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_terminal_sees_the_memory_plan_and_progress() -> None:
    reader, terminal = pty.openpty()
    command = [sys.executable, "-m", "headway", "generate", "x", *SMALL, "--max-tokens", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        os.close(terminal)
        shown = read_until_closed(reader)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert "KV cache" in shown
    assert "100 %" in shown


def read_until_closed(descriptor: int) -> str:
    """All that is written to a pseudo-terminal until its last writer is gone."""
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 4096)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(descriptor)
    return b"".join(chunks).decode()


def test_chat_answers_each_line() -> None:
    result = headway(
        "chat", *SMALL, "--max-tokens", "4", stdin="import os\n/clear\nimport re\n/exit\nnever\n"
    )
    assert result.returncode == 0, result.stderr
    quick = headway("chat", *SMALL, "--max-tokens", "4", "-q", "import os")
    assert quick.returncode == 0
    assert quick.stdout


def test_a_missing_package_is_one_line_with_its_remedy() -> None:
    script = "import sys; sys.modules['torch'] = None; from headway.cli import main; sys.exit(main(['generate', 'x']))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "headway: error: torch is not installed (pip install torch)\n"


def test_doctor_is_ready_here() -> None:
    result = headway("doctor")
    assert result.returncode == 0, result.stdout
    assert "headway is ready" in result.stdout
    assert "_core" in result.stdout


def test_underscores_are_dashes_in_flags_but_not_in_prompts() -> None:
    words = ["generate", "--max_tokens", "3", "--stop=a_b", "--", "--a_prompt"]
    args = parse(build_parser(), words)
    assert (args.max_tokens, args.stop, args.prompt) == (3, ["a_b"], "--a_prompt")


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4096", "32k", "4GiB", "1.5m", "2gb")] == [
        4096,
        32_000,
        4 * 2**30,
        1_500_000,
        2 * 10**9,
    ]


def test_memory_for_states_can_be_given_in_gigabytes() -> None:
    args = parse(build_parser(), ["generate", "x", "--mamba-cache-gb", "1.5"])
    assert given_settings(args) == {"snapshot_memory_bytes": 1_500_000_000}
    assert "--mamba-cache-gb" in build_parser(shows_all=True).subparsers["generate"].format_help()


def test_ctrl_c_exits_with_130() -> None:
    command = [
        sys.executable,
        "-m",
        "headway",
        "generate",
        "x",
        *SMALL,
        "--max-tokens",
        "200",
        "--ignore-eos",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # the first token is out: the loop is running
        process.send_signal(signal.SIGINT)
        begin_s = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    # A process fast enough to be done before the signal came has ended well.
    assert process.returncode in (130, 0)
    assert time.monotonic() - begin_s < 60
