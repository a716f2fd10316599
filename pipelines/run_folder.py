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

DECIDES = "decides.json"
"""What the weights in a folder are a function of: keys of the config, then names of data and of other weights."""


def run_folder(run: RunSection, default: str, *, caches: bool = True, trains: bool = False) -> Path:
    """The absolute folder of a run, named `default` unless `run.name` names it; nothing is made there yet.

    Args:
        caches: whether the pipeline keeps something in `run.cache` too.
        trains: whether it leaves a model in the folder, which then may hold one.

    Raises:
        ValueError: nothing can be written there, or what a training run has written would be replaced.
    """
    folder = Path(run.output).expanduser().absolute() / (run.name or default)
    if not trains and (folder / DECIDES).exists():
        raise ValueError(f"run.name: {folder} holds a run that trained a model, whose records this would replace: "
                         "choose another run.name, or none")
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


def check_same(folder: Path, decides: dict[str, Any], begun: bool = False, *, partly: bool = False) -> None:
    """A folder that holds weights, or work `begun`, belongs to one config: name the first key that differs.

    Args:
        partly: `decides` says what is known so far, and nothing is written yet.
    """
    path = folder / DECIDES
    if not path.exists() or not (begun or newest_step(folder) or (folder / "best").exists()):
        if not partly:
            write_json(path, decides)
        return
    before, now = (flatten(values) for values in (json.loads(path.read_text(encoding="utf-8")), decides))
    for key in sorted(now if partly else before.keys() | now.keys(), key=lambda key: ("." not in key, key)):
        if before.get(key) != now.get(key):
            old, new = before.get(key), now.get(key)
            other = f"{key}={old}, not {new}" if "." in key else f"another {key} ({old!s:.20}, not {new!s:.20})"
            raise ValueError(f"{folder} holds a run with {other}: choose another run.name, or delete that folder")
