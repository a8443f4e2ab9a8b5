"""The table of sampling fields in docs/features.md, made of the code: `python -m headway.sampling.page FILE`."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from headway.fields import specs
from headway.request import SamplingParams

BEGIN, END = "<!-- fields of SamplingParams -->", "<!-- end of fields -->"


def render_fields() -> str:
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    lines = ["| field | default | accepts | meaning |", "|---|---|---|---|"]
    for name, spec in specs(SamplingParams).items():
        default = "unset" if defaults[name] is None else f"`{defaults[name]}`"
        lines.append(f"| `{name}` | {default} | {spec.limit} | {spec.help} |")
    return "\n".join(lines)


def renew(page: str) -> str:
    """The page with its table as the code has it."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{render_fields()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
