"""Whatever stands in a checkpoint's files: it loads, or one typed error says why not, and no code of it runs."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headway.errors import HeadwayError
from headway.models.loader import load_params
from headway.sampling.defaults import read_generation_defaults
from headway.text import ChatTemplate, Tokenizer
from tests.models.checkpoints import case_named, save_model
from tests.models.hostile import damage
from tests.server.scorecard import record

ASSETS = Path(__file__).parents[2] / "python" / "headway" / "assets" / "tiny"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
KINDS = (("Config", "configuration"), ("ModelForCausalLM", "modeling"), ("Tokenizer", "tokenization"))
MAX_GROWN_BYTES = 256 << 20
Reader = Callable[[Path], object]
READERS: dict[str, Reader] = {
    "weights": lambda folder: load_params(folder, dtype="float32"),
    "tokenizer": lambda folder: Tokenizer.from_dir(folder).encode("é"),
    "template": ChatTemplate.find,
    "defaults": lambda folder: read_generation_defaults(folder, is_applied=True),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of each kind of layer, two of them in shards with an index."""
    found = []
    for name in ("nemotron_h", "granite_moe", "qwen3_moe", "mamba2", "llama"):
        folder = tmp_path_factory.mktemp(name)
        shards = {"max_shard_size": "40KB"} if name in ("nemotron_h", "llama") else {}
        save_model(case_named(name), folder, **shards)
        for file in TEXT_FILES:
            shutil.copy(ASSETS / file, folder / file)
        found.append(folder)
    return found


def outcome(reader: Reader, folder: Path) -> str:
    try:
        reader(folder)
    except HeadwayError:
        return "refused"
    return "read"


def run(
    checkpoints: list[Path], readers: dict[str, Reader], num_files: int, scratch: Path, seed: int = 1
) -> Counter[str]:
    """Damages a file at a time and reads all of its folder. Fails with what was changed."""
    draws = random.Random(seed)
    ends: Counter[str] = Counter()
    for _ in range(num_files):
        folder = Path(shutil.copytree(draws.choice(checkpoints), scratch / "copy"))
        file = draws.choice(sorted(folder.iterdir()))
        how = damage(file, draws)
        for name, reader in readers.items():
            try:
                ends[outcome(reader, folder)] += 1
            except BaseException as error:
                raise AssertionError(f"{name}: {file.name}, {how}: {error!r}") from error
        shutil.rmtree(folder)
    return ends


@pytest.mark.parametrize("num_files", [100, pytest.param(4000, marks=pytest.mark.long)])
def test_a_damaged_file_is_read_or_refused(checkpoints: list[Path], num_files: int, tmp_path: Path) -> None:
    run(checkpoints, READERS, 20, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = run(checkpoints, READERS, num_files, tmp_path, seed=2)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert min(ends["read"], ends["refused"]) > num_files // 2
    assert grown_bytes < MAX_GROWN_BYTES
    if num_files > 1000:
        record("F1 damaged files", num_files=num_files, grown_bytes=grown_bytes, **ends)


def test_a_reader_that_trusts_a_file_is_found(checkpoints: list[Path], tmp_path: Path) -> None:
    def trusting(folder: Path) -> Any:
        return json.loads((folder / "config.json").read_text())["vocab_size"] + 1

    with pytest.raises(AssertionError, match=r"config\.json"):
        run(checkpoints, {"trusting": trusting}, 2000, tmp_path)


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.fixture
def trap(checkpoints: list[Path], tmp_path: Path) -> Path:
    """A folder whose every file that could be run writes a file named `sprung` beside it."""
    folder = Path(shutil.copytree(checkpoints[0], tmp_path / "trap"))
    sprung = tmp_path / "sprung"
    code = f"open({str(sprung)!r}, 'w')\n"
    for module in (
        "modeling_x",
        "configuration_x",
        "tokenization_x",
        "sitecustomize",
        "torch",
        "json",
        "headway",
    ):
        (folder / f"{module}.py").write_text(code)
    names = {f"Auto{kind}": f"{module}_x.X" for kind, module in KINDS}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**values, "auto_map": names}))
    for name in ("pytorch_model.bin", "training_args.bin", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Canary(sprung)))
    return folder


@pytest.mark.parametrize("flags", [[], ["-OO"]], ids=str)
def test_no_code_of_a_checkpoint_runs(trap: Path, flags: list[str]) -> None:
    """Loaded from within its own folder, where Python would look for modules first."""
    words = ["-P", *flags, "-m", "headway", "generate", "x", "--model", str(trap), "--tokenizer", str(ASSETS)]
    command = [sys.executable, *words, "--device", "cpu", "--max-tokens", "2", "--max-model-len", "64"]
    done = subprocess.run(command, cwd=trap, capture_output=True, text=True, check=False)
    assert not (trap.parent / "sprung").exists()
    assert done.returncode == 0, done.stderr


def test_the_trap_would_spring(trap: Path) -> None:
    with (trap / "training_args.bin").open("rb") as file:
        pickle.load(file)
    assert (trap.parent / "sprung").exists()
