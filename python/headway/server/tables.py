"""Tables of docs/serving.md and docs/metrics.md, made of the code: `python -m headway.server.tables PAGE` renews them.

A table stands between `<!-- table: name -->` and `<!-- end -->`; the words around it are the page's own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from headway.fields import flag, specs
from headway.server.decode import REFUSED_FIELDS
from headway.server.endpoints import ENDPOINTS
from headway.server.errors import ERROR_TABLE
from headway.server.exposition import Metric
from headway.server.metrics import METRICS
from headway.server.metrics_vllm import VLLM_METRICS
from headway.server.schemas.chat import ChatRequest
from headway.server.schemas.common import IGNORED_FIELDS
from headway.server.schemas.completions import CompletionRequest
from headway.server.settings import ServerSettings


def endpoints() -> str:
    rows = [
        f"| {'/'.join(e.methods)} | `{e.path.replace(':path', '')}` | {e.summary} | {_access(e.is_open, e.is_dev)} |"
        for e in ENDPOINTS
    ]
    return _table("| method | path | what | key |", rows)


def _access(is_open: bool, is_dev: bool) -> str:
    return "no" if is_open else "yes, with `--enable-dev-endpoints`" if is_dev else "yes"


def settings() -> str:
    defaults = {f.name: f.default for f in fields(ServerSettings)}
    rows = []
    for name, spec in specs(ServerSettings).items():
        default = "unset" if defaults[name] is None else f"`{defaults[name]}`"
        rows.append(f"| `{flag(name)}` | {default} | {spec.limit} | {spec.tier} | {spec.help} |")
    return _table("| flag | default | accepts | tier | meaning |", rows)


def errors() -> str:
    rows = [
        f"| {row.status} | `{row.type}` | `{row.code}` | {kind.replace('_', ' ')} |"
        for kind, row in ERROR_TABLE.items()
    ]
    return _table("| status | type | code, where no other is named | kind |", rows)


def request_fields() -> str:
    """Which endpoint reads which field."""
    readers = {"completions": CompletionRequest, "chat": ChatRequest}
    names = dict.fromkeys(name for kind in readers.values() for name in kind.__struct_fields__)
    rows = []
    for name in names:
        if name in IGNORED_FIELDS:
            continue
        marks = ["yes" if name in kind.__struct_fields__ else "" for kind in readers.values()]
        rows.append(f"| `{name}` | {' | '.join(marks)} |")
    return _table("| field | completions | chat |", rows)


def ignored() -> str:
    return ", ".join(f"`{name}`" for name in IGNORED_FIELDS)


def refused() -> str:
    return _table(
        "| field | instead |", [f"| `{name}` | {advice} |" for name, advice in REFUSED_FIELDS.items()]
    )


def _metrics(metrics: Sequence[Metric]) -> str:
    rows = [f"| `{m.sample}` | {m.kind} | {f'`{m.label}`' if m.label else ''} | {m.help} |" for m in metrics]
    return _table("| metric | kind | label | what |", rows)


def metrics() -> str:
    return _metrics(METRICS)


def vllm_metrics() -> str:
    return _metrics(VLLM_METRICS)


TABLES: dict[str, Callable[[], str]] = {
    "endpoints": endpoints,
    "settings": settings,
    "errors": errors,
    "request fields": request_fields,
    "ignored fields": ignored,
    "refused fields": refused,
}

METRIC_TABLES: dict[str, Callable[[], str]] = {"metrics": metrics, "vllm metrics": vllm_metrics}


def renew(page: str) -> str:
    """The page with every table as the code has it now. Raises KeyError for a table that there is not."""

    tables = TABLES | METRIC_TABLES

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{tables[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def _table(head: str, rows: list[str]) -> str:
    return "\n".join([head, re.sub(r"[^|]+", "---", head.strip()), *rows])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
