"""A build does what its variables say; one that cannot says what is missing and the command that mends it."""

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


def run_cmake(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configures the project with these options, and these variables in place of this process's own."""
    for name in ("HEADWAY_DEVICE", "HEADWAY_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDACXX"):
        environment.setdefault(name, "")
    kept = {name: value for name, value in {**os.environ, **environment}.items() if value}
    command = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
    return subprocess.run(command, env=kept, capture_output=True, text=True)


def refusal(build: Path, *options: str, **environment: str) -> str:
    """What CMake prints when it refuses to configure: one error, and no call stack."""
    done = run_cmake(build, *options, **environment)
    assert done.returncode != 0, done.stdout
    assert "Call Stack" not in done.stderr
    assert done.stderr.count("CMake Error") == 1
    return " ".join(done.stderr.split())


def test_without_a_cxx_compiler(tmp_path: Path) -> None:
    message = refusal(tmp_path / "build", PATH=str(tmp_path), CXX=str(tmp_path / "none"))
    assert "headway: no working C++ compiler was found" in message
    assert "apt-get install g++" in message
    assert "CXX=" in message


def test_cuda_asked_for_without_nvcc(tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    message = refusal(tmp_path / "build", HEADWAY_DEVICE="cuda", CUDACXX=none)
    assert "HEADWAY_DEVICE=cuda, but no working nvcc was found" in message
    assert "HEADWAY_DEVICE=cpu pip install ." in message


def test_an_unknown_device(tmp_path: Path) -> None:
    message = refusal(tmp_path / "build", HEADWAY_DEVICE="tpu")
    assert "HEADWAY_DEVICE must be auto, cpu or cuda, not 'tpu'" in message


def test_without_pybind11(tmp_path: Path) -> None:
    """A bare interpreter: no site-packages, so no pybind11."""
    bare = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = bare / "bin" / "python"
    isolated = ["-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"]
    message = refusal(tmp_path / "build", "-DHEADWAY_DEVICE=cpu", f"-DPython_EXECUTABLE={python}", *isolated)
    assert "pybind11 is not installed for" in message
    assert "-m pip install" in message


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
def test_malformed_cuda_architectures(tmp_path: Path) -> None:
    message = refusal(tmp_path / "build", HEADWAY_CUDA_ARCHS="hopper")
    assert "CUDA architectures must look like 80;90a" in message
    assert "not 'hopper'" in message


@needs_nvcc
@pytest.mark.parametrize(
    ("variables", "architectures"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "9.0a 8.0+PTX"}, "90a;80"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0a", "HEADWAY_CUDA_ARCHS": "80"}, "80"),
    ],
)
def test_architectures_are_those_of_the_environment(
    tmp_path: Path, variables: dict[str, str], architectures: str
) -> None:
    done = run_cmake(tmp_path / "build", "-DHEADWAY_PYTHON=OFF", **variables)
    assert f"building for the CPU and for CUDA {architectures} with" in done.stdout


def test_ccache_is_used_where_it_is(tmp_path: Path) -> None:
    ccache = tmp_path / "bin" / "ccache"
    ccache.parent.mkdir()
    ccache.write_text('#!/bin/sh\nexec "$@"\n')
    ccache.chmod(0o755)
    path = f"{ccache.parent}{os.pathsep}{os.environ['PATH']}"
    done = run_cmake(tmp_path / "build", "-DHEADWAY_DEVICE=cpu", "-DHEADWAY_PYTHON=OFF", PATH=path)
    assert done.returncode == 0, done.stderr
    assert str(ccache) in (tmp_path / "build" / "build.ninja").read_text()
