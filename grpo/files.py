"""Files that are there whole or not at all: written under another name, flushed to disk, then renamed.

The other name holds random digits: process ids repeat in containers that share a folder.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody else writes to."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def write_text(path: str | Path, text: str) -> None:
    temporary = temporary_name(Path(path))
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def write_json(path: str | Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
