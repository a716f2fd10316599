"""Which of a run's checkpoints is gone on from, and which are kept."""

import shutil
from pathlib import Path

import pytest
import torch

from grpo import checkpoint as checkpoints
from grpo.checkpoint import load_checkpoint, load_model, save_checkpoint
from grpo.run_checkpoints import (
    checkpoint_folder,
    latest_checkpoint,
    mend_interrupted,
    newest_step,
    prune_checkpoints,
)
from tests.test_checkpoint import make, same_tensors

torch.set_num_threads(1)
MAPS = Path("/proc/self/maps")


@pytest.mark.parametrize("whole", [True, False])
def test_a_save_that_was_killed_between_two_names_is_mended(tmp_path, whole):
    first, second = make(0), make(1)
    save_checkpoint(tmp_path / "best", first, config={})
    save_checkpoint(tmp_path / "new", second, config={})
    (tmp_path / "best").rename(tmp_path / ".best.0123456789ab")
    (tmp_path / "new").rename(tmp_path / ".best.ba9876543210")
    if not whole:
        (tmp_path / ".best.ba9876543210" / "manifest.json").unlink()
    save_checkpoint(tmp_path / "final", first, config={})
    (tmp_path / ".final.0123456789ab").mkdir()
    mend_interrupted(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "final"]
    assert same_tensors(load_model(tmp_path / "best").state_dict(), (second if whole else first).state_dict())
    assert same_tensors(load_model(tmp_path / "final").state_dict(), first.state_dict())


def test_no_checkpoint_is_none_and_a_wrong_folder_an_error(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None and newest_step(tmp_path) == 0
    with pytest.raises(ValueError, match="is no checkpoint: it has no manifest.json"):
        load_model(tmp_path)


def test_pruning_keeps_the_newest(tmp_path):
    for step in (5, 40, 300):
        save_checkpoint(checkpoint_folder(tmp_path, step), make(), config={})
    prune_checkpoints(tmp_path, 2, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000040", "step-00000300"]


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
def test_a_loaded_checkpoint_s_files_are_not_held(tmp_path):
    """NFS would keep the folder of a file that is still mapped."""
    state = {"learner": {"moments": torch.arange(1000.0)}}
    save_checkpoint(tmp_path / "one", make(), config={}, state=state)
    held = load_checkpoint(tmp_path / "one")
    assert torch.equal(held.state["learner"]["moments"], state["learner"]["moments"]) and held.tensors
    assert str(tmp_path) not in MAPS.read_text()


def test_a_user_s_copy_of_a_checkpoint_stays_and_is_not_gone_on_from(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (5, 6):
        save_checkpoint(checkpoint_folder(root, step), make(), config={})
    copies = [root / "step-00000006-before-the-change", root / "step-old"]
    for copy in copies:
        shutil.copytree(checkpoint_folder(root, 6), copy)
    assert newest_step(tmp_path) == 6
    prune_checkpoints(root, 1, 6)
    assert all(copy.is_dir() for copy in copies) and not checkpoint_folder(root, 5).exists()


def test_pruning_never_keeps_a_damaged_checkpoint_for_one_that_followed(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (5, 300):
        save_checkpoint(checkpoint_folder(root, step), make(), config={})
    (checkpoint_folder(root, 300) / checkpoints.MODEL).write_bytes(b"")
    assert latest_checkpoint(root) == checkpoint_folder(root, 5) and newest_step(tmp_path) == 5
    save_checkpoint(checkpoint_folder(root, 6), make(), config={})
    prune_checkpoints(root, 1, 6)
    assert latest_checkpoint(root) == checkpoint_folder(root, 6) and len(list(root.iterdir())) == 1
