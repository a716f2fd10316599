"""The folder of a run: where it lies, whether it can be written, and whose it is.

1. It is named and tried before anything long begins: what cannot be kept, there or in `run.cache`, is not made.
2. It belongs to one process at a time (`alone`) and to one config (`check_same`).
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.config import RunSection
from grpo.files import write_json
from grpo.run_checkpoints import mend_interrupted, newest_step
from pipelines.metric_names import flatten


def run_folder(run: RunSection, default: str, *, caches: bool = True) -> Path:
    """The absolute folder of a run, named `default` unless `run.name` names it; nothing is made there yet.

    Args:
        caches: whether the pipeline keeps something in `run.cache` too.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = Path(run.output).expanduser().absolute() / (run.name or default)
    check_folder(folder, "run.output")
    if caches:
        check_folder(Path(run.cache).expanduser().absolute(), "run.cache")
    return folder


def check_folder(folder: Path, key: str) -> None:
    """Raise a ValueError that names the option `key` where no file can be written in a folder, there or to be made."""
    try:
        _try_to_write(folder)
    except OSError as error:
        raise ValueError(f"{key}: cannot write to {folder} ({error.strerror}): choose another folder") from None


def check_file(file: Path, key: str) -> None:
    """Raise a ValueError that names the option `key` where a file cannot be written, there or to be made."""
    if file.is_dir():
        raise ValueError(f"{key}: {file} is a folder: name a file in it")
    if not file.exists():
        check_folder(file.absolute().parent, key)
    elif not os.access(file, os.W_OK):
        raise ValueError(f"{key}: cannot write to {file} (it may only be read): choose another file")


def _try_to_write(folder: Path) -> None:
    """Write where the folder is, or where what there is of its path ends."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except FileNotFoundError:
        if folder.is_symlink():  # which leads nowhere
            raise
        _try_to_write(folder.parent)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second process waits, and then finds the finished model. What an earlier one left
    half-written is mended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        mend_interrupted(folder)
        yield


def check_same(folder: Path, decides: dict[str, Any], begun: bool = False) -> None:
    """A folder that holds weights, or work `begun`, belongs to one config: name the first key that differs."""
    path = folder / "decides.json"
    if not path.exists() or not (begun or newest_step(folder) or (folder / "best").exists()):
        write_json(path, decides)
        return
    before, now = (flatten(values) for values in (json.loads(path.read_text(encoding="utf-8")), decides))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(f"{folder} holds a run with {key}={before.get(key)}, not {now.get(key)}: choose another "
                             "run.name, or delete that folder")
