"""Files that tests of reading make."""

from __future__ import annotations

import json
from pathlib import Path


def put(path: Path, data: bytes | str) -> Path:
    """A file with these bytes, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines(*rows: object) -> str:
    """A row of JSON each."""
    return "".join(json.dumps(row) + "\n" for row in rows)
