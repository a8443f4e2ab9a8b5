"""Runs one target under libFuzzer, by way of atheris: `python -m tests.fuzz.run NAME [libFuzzer's flags]`.

Ends with another code than 0, and the input on stderr, where something other than an error of Headway's came out.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

import atheris


def main() -> None:
    with atheris.instrument_imports(include=["headway", "tests.fuzz.targets"]):
        from tests.fuzz import targets
    name, *flags = sys.argv[1:]
    memory = Path("/dev/shm")  # each input is a file anew: a disk would be most of the time
    scratch = Path(
        tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
    )  # libFuzzer ends the process by itself
    atexit.register(shutil.rmtree, scratch)
    target = targets.Target(targets.planted) if name == "planted" else targets.targets(scratch)[name]
    corpus = scratch / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(target.seeds):
        (corpus / str(index)).write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), f"-max_len={target.max_bytes}", *flags], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
