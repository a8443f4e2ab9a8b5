"""What README says is true: its Python runs, its tree is the tree, its models are the ones that load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headway.models.registry import FAMILIES
from tests.pages import python_blocks, run_python

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(page.relative_to(ROOT) for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_ten_lines_complete_their_prompt(tmp_path: Path) -> None:
    (source,) = python_blocks("README.md")
    assert "def read_lines(path):" in run_python(source, tmp_path)


def test_the_models_are_those_that_load() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted((family.model_type, family.architecture) for family in FAMILIES.values())


def test_every_path_of_the_tree_is_there() -> None:
    (tree,) = re.findall(r"^```\n(csrc/ .*?)^```$", README, re.MULTILINE | re.DOTALL)
    parent = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        path = parent / name if line.startswith(" ") else Path(name)
        parent = parent if line.startswith(" ") else path
        assert (ROOT / path).exists(), line


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=str
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
