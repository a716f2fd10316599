"""The checkpoints of a run: where a step's goes, which is the newest whole one, and which are kept."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from grpo.checkpoint import MANIFEST, verify_checkpoint

log = logging.getLogger(__name__)


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return Path(root) / f"step-{step:08d}"


def latest_checkpoint(root: str | Path) -> Path | None:
    """The newest checkpoint that is whole, or None; a warning names each damaged one that is passed over."""
    for folder in reversed(_checkpoints(root)):
        try:
            verify_checkpoint(folder)
            return folder
        except ValueError as error:
            log.warning("skipping a checkpoint: %s", error)
    return None


def newest_step(folder: str | Path) -> int:
    """Step, or round, of the newest whole checkpoint of a run; 0 without one."""
    newest = latest_checkpoint(Path(folder) / "checkpoints")
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def find_checkpoint(path: str | Path, key: str) -> Path:
    """The checkpoint folder itself, or of a run's folder the finished model, else the newest checkpoint; absolute.

    Args:
        key: the option that holds the path.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path).expanduser().absolute()
    for finished in (folder, folder / "final", folder / "best"):
        if (finished / MANIFEST).is_file():
            return finished
    for root in (folder, folder / "checkpoints"):
        newest = latest_checkpoint(root) if root.is_dir() else None
        if newest is not None:
            return newest
    raise ValueError(f"{key} {path}: no checkpoint there; give a checkpoint's folder or that of its run")


def prune_checkpoints(root: str | Path, keep: int, step: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what an interrupted save left behind.

    Args:
        step: of the checkpoint just saved. One of a later step is damaged: the run went on from before it.
    """
    newest = checkpoint_folder(root, step)
    kept = [folder for folder in _checkpoints(root) if folder.name <= newest.name][-keep:]
    for folder in (*_checkpoints(root), *Path(root).glob(".step-*")):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)  # who reads it may hold a file; the next call tries again


def mend_interrupted(folder: str | Path) -> None:
    """Clear away what a killed save of `best` or `final` left behind, in a folder that nobody else writes to.

    A save puts the old one aside before the new one takes its name; where the kill came between, the newest whole one
    of the two takes it.
    """
    for name in ("best", "final"):
        left = sorted(Path(folder).glob(f".{name}.*"), key=lambda path: path.stat().st_mtime_ns)
        while left and not (Path(folder) / name).exists():
            newest = left.pop()
            try:
                verify_checkpoint(newest)
                newest.rename(Path(folder) / name)
            except ValueError:
                shutil.rmtree(newest)
        for path in left:
            shutil.rmtree(path)


def _checkpoints(root: str | Path) -> list[Path]:
    """The run's own, by step; a user's copy under another name is not one of them."""
    steps = (path for path in Path(root).glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))
    return sorted(path for path in steps if path.is_dir())
