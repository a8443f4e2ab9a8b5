"""Files of a checkpoint as an enemy would write them: one value replaced, or some bytes changed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    -1,
    0,
    1,
    3,
    10**6,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    1e308,
    -0.0,
    1e-320,
    None,
    True,
    False,
]
VALUES += ["", "x", "../x", "\x00", "F8_E4M3", "a" * 10_000, [], {}, [[]], {"a": 1}, [1] * 50]
PIECES = [b'"', b"{", b"[", b"9", b"-", b",", b"}", b"\x00", b"\xff", b"null", b"1e999", b"NaN"]
HEAD_BYTES = 4000  # most changes fall here: there are a file's lengths and names


def damage(file: Path, draws: random.Random) -> str:
    """Changes the file and says how."""
    content = file.read_bytes()
    if draws.random() < 0.6:
        if file.suffix == ".json":
            document, how = replaced(json.loads(content), draws)
            file.write_text(json.dumps(document))
            return how
        if file.suffix == ".safetensors":
            num_bytes = int.from_bytes(content[:8], "little")
            document, how = replaced(json.loads(content[8 : 8 + num_bytes]), draws)
            header = json.dumps(document).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + num_bytes :])
            return how
    file.write_bytes(changed(content, draws))
    return "bytes"


def replaced(document: Any, draws: random.Random) -> tuple[Any, str]:
    """With one value replaced or left out, however deep it lies."""
    path, value = draws.choice(list(paths(document))), draws.choice(VALUES)
    if not path:
        return value, f"all = {value!r}"[:80]
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if draws.random() < 0.1:
        del parent[path[-1]]
        return document, f"without {path}"
    parent[path[-1]] = value
    return document, f"{path} = {value!r}"[:120]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    )
    for key, inner in items:
        yield from paths(inner, (*path, key))


def changed(content: bytes, draws: random.Random) -> bytes:
    """Cut short, or with bytes changed, put in and taken out."""
    if draws.random() < 0.25:
        return content[: draws.randrange(len(content) + 1)]
    found = bytearray(content)
    reach = len(found) if draws.random() < 0.2 else min(len(found), HEAD_BYTES)
    for _ in range(draws.choice([1, 1, 2, 5])):
        place, kind = draws.randrange(max(1, reach)), draws.randrange(3)
        if kind == 0:
            found[place : place + 1] = bytes([draws.randrange(256)])
        elif kind == 1:
            found[place:place] = draws.choice(PIECES)
        else:
            del found[place : place + draws.randrange(1, 9)]
    return bytes(found)
