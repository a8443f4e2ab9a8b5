"""A build that cannot succeed says what is missing and the command that mends it, in one CMake error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent


def tool(name: str) -> str:
    """cmake or ninja of this environment, else of the machine."""
    beside = SCRIPTS / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def configure(build: Path, *options: str, **environment: str) -> str:
    """What CMake prints when it refuses to configure the project with these options and variables."""
    for name in ("HEADWAY_DEVICE", "HEADWAY_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDACXX"):
        environment.setdefault(name, "")
    kept = {name: value for name, value in {**os.environ, **environment}.items() if value}
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    assert "Call Stack" not in done.stderr
    assert done.stderr.count("CMake Error") == 1
    return " ".join(done.stderr.split())


def test_without_a_cxx_compiler(tmp_path: Path) -> None:
    message = configure(tmp_path / "build", PATH=str(tmp_path), CXX=str(tmp_path / "none"))
    assert "headway: no working C++ compiler was found" in message
    assert "apt-get install g++" in message
    assert "CXX=" in message


def test_cuda_asked_for_without_nvcc(tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    message = configure(tmp_path / "build", HEADWAY_DEVICE="cuda", CUDACXX=none)
    assert "HEADWAY_DEVICE=cuda, but no working nvcc was found" in message
    assert "HEADWAY_DEVICE=cpu pip install ." in message


def test_an_unknown_device(tmp_path: Path) -> None:
    message = configure(tmp_path / "build", HEADWAY_DEVICE="tpu")
    assert "HEADWAY_DEVICE must be auto, cpu or cuda, not 'tpu'" in message


def test_without_pybind11(tmp_path: Path) -> None:
    """A bare interpreter: no site-packages, so no pybind11."""
    bare = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = bare / "bin" / "python"
    isolated = ["-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"]
    message = configure(
        tmp_path / "build", "-DHEADWAY_DEVICE=cpu", f"-DPython_EXECUTABLE={python}", *isolated
    )
    assert "pybind11 is not installed for" in message
    assert "-m pip install" in message


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_malformed_cuda_architectures(tmp_path: Path) -> None:
    message = configure(tmp_path / "build", HEADWAY_CUDA_ARCHS="hopper")
    assert "CUDA architectures must look like 80;90a" in message
    assert "not 'hopper'" in message
