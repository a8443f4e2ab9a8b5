"""Pages of the documentation, their code blocks, and what can be checked of each kind."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The log says what was so on its day, and is not changed afterwards.
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if page.name not in ("log.md",))
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|(?<=\A))((?:    \S.*\n)+)")
COMMANDS = ("headway", "make", "pip", "pytest", "nsys", "source", "python")


@dataclass(frozen=True)
class Block:
    """A code block. `kind` is its language; "commands" and "picture" for those that name none."""

    page: str
    kind: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command, without variables before it and comments behind it."""
        whole = self.text.replace("\\\n", " ")
        lines = [shlex.split(line, comments=True) for line in whole.splitlines()]
        return [words[words.index(name) :] for words in lines if words for name in [_command(words)] if name]


def _command(words: list[str]) -> str:
    """The first word but settings of the environment."""
    names = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    return names[0] if names and names[0] in COMMANDS else ""


def blocks(page: Path) -> list[Block]:
    """Fenced ones, and commands that are indented."""
    text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
    found = [Block(name, match[1] or _kind(match[2]), match[2]) for match in _FENCED.finditer(text)]
    for match in _INDENTED.finditer(_FENCED.sub("", text)):
        found.append(Block(name, _kind(match[1]), match[1].replace("\n    ", "\n")[4:]))
    return found


def _kind(text: str) -> str:
    """All of its lines are commands, or none is."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    are_commands = [bool(_command(line.split())) for line in lines]
    return "commands" if are_commands and all(are_commands) else "picture"


def all_blocks(kind: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.kind == kind]


def python_blocks(page: str) -> list[str]:
    """Of one page, such as "docs/features.md"; there is at least one."""
    found = [block.text for block in blocks(ROOT / page) if block.kind == "python"]
    assert found, f"{page} has no Python"
    return found


def run_python(source: str, folder: Path) -> str:
    """What it prints, run as a user would who pasted it."""
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stdout
