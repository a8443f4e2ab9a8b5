"""Holds a wheel to what a user gets: the whole package and nothing else, and a command that runs from it alone.

usage: check_wheel.py WHEEL, by a Python that has headway's dependencies
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "headway"
BUILT = ("_core", "_cpu", "_cuda")


def check_names(names: set[str]) -> None:
    sources = {p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*") if p.is_file()}
    wanted = {name for name in sources if "__pycache__" not in name and not name.endswith(".so")}
    assert wanted <= names, f"not in the wheel: {sorted(wanted - names)}"
    rest = names - wanted
    modules = {name for name in rest if re.fullmatch(rf"headway/({'|'.join(BUILT)})\.[\w.-]+\.so", name)}
    assert {name.split("/")[1].split(".")[0] for name in modules} >= {"_core", "_cpu"}, modules
    metadata = {name for name in rest if re.match(r"headway-[\d.]+\.dist-info/", name)}
    assert any(name.endswith("licenses/LICENSE") for name in metadata), metadata
    assert rest == modules | metadata, f"nobody wants {sorted(rest - modules - metadata)}"


def check_command(wheel: zipfile.ZipFile) -> None:
    """-S: without the site's hooks, such as an editable install of this tree."""
    with tempfile.TemporaryDirectory() as folder:
        wheel.extractall(folder)
        paths = [folder, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        words = ["generate", "def", "--max-tokens", "4"]
        run = f"import sys; sys.path[:0] = {paths}; from headway.cli import main; sys.exit(main({words}))"
        done = subprocess.run([sys.executable, "-S", "-c", run], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


if __name__ == "__main__":
    with zipfile.ZipFile(sys.argv[1]) as opened:
        check_names(set(opened.namelist()))
        check_command(opened)
    print(f"{Path(sys.argv[1]).name} is whole and runs")
