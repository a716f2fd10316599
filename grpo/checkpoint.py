"""Checkpoints: a folder of safetensors and JSON, complete or absent, never half read.

    manifest.json          sha256 of every other file
    checkpoint.json        architecture, resolved config, training state
    model.safetensors      trunk.* and heads.*
    training.safetensors   tensors of the training state (optimizer, RNG, buffers)
    tokenizer/             rank file and description

1. Written under a temporary name, flushed to disk, then renamed. No pickle: a checkpoint runs no code when it is read.
2. What may be missing is a list: a whole head, the lm head's residual, a field of the architecture. It is named as
   fresh. Anything else that is missing, and anything that is too much, is an error, for it is most often a typo.
3. A tied lm head has no tensor of its own; an untied head that reads such a checkpoint starts as a copy of the token
   embedding, which is what tied means.
4. Adapters are merged into the trunk's weights, so that a checkpoint is read as any other; a training state may hold
   them beside it.
5. A frozen trunk is assigned new tensors, never written into: its memory may be shared by other processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.config import ModelSection, RewardSection
from grpo.files import flush, temporary_name
from grpo.lora import merged_state
from grpo.model import GPT, MODES
from grpo.tokenizer import Tokenizer, Vocabulary

HEADS = (*MODES.values(), "critic", "sampler")
REWARD_SHAPE = ("layers", "masked_passes", "pooling", "reach", "hidden", "spectral_norm")
"""Fields of RewardSection that decide the shape of a head; the others are about training."""
MANIFEST, DESCRIPTION, MODEL, TRAINING = "manifest.json", "checkpoint.json", "model.safetensors", "training.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    architecture: what rebuilds the GPT. config: the run's resolved config. tensors: the GPT's, by name. state: the
    training state, as it was given. provenance: `Dataset.provenance` of each text that it was trained on, its
    base's first; empty where that is not known.
    """

    architecture: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    state: Any
    provenance: list[dict[str, Any]]


def save_checkpoint(
    folder: str | Path,
    model: GPT,
    *,
    config: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    state: Any = None,
    provenance: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write a checkpoint, replacing what has this name.

    Args:
        config: the run's resolved config, plain values.
        tokenizer: saved beside the weights, so that the checkpoint can generate text by itself.
        state: tensors, numbers, strings and None in dicts, lists and tuples of any depth (optimizer and RNG states,
            buffers, counters). It comes back equal to the bit.
        provenance: `Dataset.provenance` of each text that the model was trained on.

    Raises:
        ValueError: the tokenizer's ids are not the model's.
    """
    folder = Path(folder)
    if tokenizer is not None and tokenizer.vocabulary != model.vocabulary:
        raise ValueError(f"{folder}: the tokenizer {tokenizer.kind} has {tokenizer.vocabulary.base_size} tokens, the "
                         f"model {model.vocabulary.base_size}: save the model with the tokenizer of its text")
    temporary = temporary_name(folder)
    temporary.mkdir(parents=True)
    training: dict[str, Tensor] = {}
    description = {"architecture": architecture(model), "config": config, "state": _pack(state, training, "state"),
                   "provenance": list(provenance)}
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
    save_file(_separate(merged_state(model)), temporary / MODEL)
    save_file(_separate(training), temporary / TRAINING)
    if tokenizer is not None:
        (temporary / "tokenizer").mkdir()
        tokenizer.save(temporary / "tokenizer")
    for name in (MODEL, TRAINING):  # safetensors makes them their owner's alone
        (temporary / name).chmod((temporary / DESCRIPTION).stat().st_mode)
    write_manifest(temporary)
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    if folder.exists():
        replaced = temporary_name(folder)
        folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced)
    else:
        temporary.rename(folder)
    flush(folder.parent)
    return folder


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a whole checkpoint, tensors on the CPU.

    Raises:
        ValueError: it is missing or damaged.
    """
    folder = Path(folder)
    verify_checkpoint(folder)
    description = _read_json(folder / DESCRIPTION)
    return Checkpoint(
        description["architecture"],
        description["config"],
        _read_tensors(folder / MODEL),
        _unpack(description["state"], _read_tensors(folder / TRAINING)),
        description.get("provenance", []),
    )


def model_digest(folder: Path) -> str:
    """Digest of a checkpoint's model: its weights, tokens, shape and mask bias, whatever else its run's config says."""
    files, description = _read_json(folder / MANIFEST), _read_json(folder / DESCRIPTION)
    held = {name: digest for name, digest in files.items() if name == MODEL or name.startswith("tokenizer/")}
    what = [held, description["architecture"], (description["state"] or {}).get("mask_bias")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def load_model(
    folder: str | Path,
    *,
    mode: str | None = None,
    reward: RewardSection | None = None,
    device: str | torch.device = "cpu",
) -> GPT:
    """Rebuild a checkpoint's GPT, each part in its dtype; a warning names what it does not hold and is fresh.

    Args:
        mode: another mode than the checkpoint's takes its trunk and the heads that both have.
        reward: shape of that mode's head; the checkpoint's when None.
    """
    folder = Path(folder)
    verify_checkpoint(folder)
    stored = _read_json(folder / DESCRIPTION)["architecture"]
    tensors = _read_tensors(folder / MODEL)
    try:
        model, fresh = _build(stored, mode, reward)
        for name, part in (("trunk", model.trunk), *((f"heads.{name}", head) for name, head in model.heads.items())):
            part.to(next((t.dtype for key, t in tensors.items() if key.startswith(f"{name}.")), torch.float32))
        fresh += load_into(model, tensors)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder}: {error}") from error
    if fresh:
        log.warning("%s: not in this checkpoint, so fresh: %s", folder, ", ".join(fresh))
    return model.to(device)


def check_tokenizer(folder: Path, tokenizer: Tokenizer, key: str) -> None:
    """Raise a ValueError that names the option `key` unless the checkpoint reads this tokenizer's tokens."""
    if load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{key} {folder} reads other tokens than the data: set data.tokenizer={folder}/tokenizer")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved with a checkpoint."""
    if not (Path(folder) / "tokenizer").is_dir():
        raise ValueError(f"{folder}: this checkpoint was saved without a tokenizer: load the one of its data")
    return Tokenizer.load(Path(folder) / "tokenizer")


def load_into(model: GPT, tensors: dict[str, Tensor]) -> list[str]:
    """Copy a checkpoint's tensors into a GPT of the same shape; heads that only the checkpoint has are left out.

    The lm head is untied, and given a residual, if the checkpoint's is.

    Returns:
        Names of the parts that the checkpoint lacks and that keep their initial values, such as `heads.critic`.

    Raises:
        ValueError: a tensor of another shape, one too many, or one too few.
    """
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith("heads.") and name.split(".")[1] in HEADS and name.split(".")[1] not in model.heads)
    }
    if "lm" in model.heads:
        if "heads.lm.matrix" in tensors:
            if model.heads["lm"].tied:
                model.untie()
                model.heads["lm"].to(tensors["heads.lm.matrix"].dtype)
            up = tensors.get("heads.lm.residual.0.weight")
            model.untie(0 if up is None else len(up))
        elif not model.heads["lm"].tied and "trunk.wte.weight" in tensors:
            tensors["heads.lm.matrix"] = tensors["trunk.wte.weight"]
    own = model.state_dict()
    present = {_part(name) for name in tensors}
    missing = [name for name in own if name not in tensors]
    fresh = sorted({_part(name) for name in missing} - present - {"trunk"})
    problems = [
        *(f"unexpected tensor {name}" for name in tensors if name not in own),
        *(f"missing tensor {name}" for name in missing if _part(name) not in fresh),
        *(
            f"tensor {name}: expected shape {list(own[name].shape)}, found {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in own and own[name].shape != tensor.shape
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise ValueError("the checkpoint does not fit this model: " + "; ".join(problems[:4]) + more)
    if model.trunk.frozen:
        trunk = {name.removeprefix("trunk."): t.to(own[name]) for name, t in tensors.items() if _part(name) == "trunk"}
        model.trunk.load_state_dict(trunk, assign=True)
        model.trunk.requires_grad_(False)
        tensors = {name: tensor for name, tensor in tensors.items() if _part(name) != "trunk"}
    model.load_state_dict(tensors, strict=False)  # checked above
    return fresh


def verify_checkpoint(folder: str | Path) -> None:
    """Raise a ValueError of one line unless every file is there and unchanged."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {MANIFEST}; give the folder that save_checkpoint wrote")
    expected = _read_json(folder / MANIFEST)
    if not isinstance(expected, dict) or not {DESCRIPTION, MODEL, TRAINING} <= expected.keys():
        raise ValueError(f"{folder / MANIFEST} is damaged: use an earlier checkpoint")
    for name, digest in expected.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing or damaged: use an earlier checkpoint")


def write_manifest(folder: Path) -> None:
    """Record the sha256 of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def architecture(model: GPT) -> dict[str, Any]:
    """What rebuilds a GPT, as JSON."""
    return {
        "model": asdict(model.model),
        "base_size": model.vocabulary.base_size,
        "mode": model.mode,
        "block_size": model.block_size,
        "reward": {name: getattr(model.reward, name) for name in REWARD_SHAPE},
        "num_classes": model.num_classes,
        "gelu": model.gelu,
    }


def _build(stored: dict[str, Any], mode: str | None, reward: RewardSection | None) -> tuple[GPT, list[str]]:
    """A GPT with initial weights, and the names of architecture fields that took their defaults."""
    stored = {**stored}
    section, shape = stored.pop("model"), stored.pop("reward", {})
    base_size, block_size = stored.pop("base_size"), stored.pop("block_size")
    known = {field.name for field in fields(ModelSection)}
    defaults = {"mode": "language_model", "num_classes": 2, "gelu": "none"}
    unknown = [
        *(f"model.{name}" for name in section.keys() - known),
        *(f"reward.{name}" for name in shape.keys() - set(REWARD_SHAPE)),
        *(stored.keys() - defaults.keys()),
    ]
    if unknown:
        raise ValueError(f"{DESCRIPTION} has unknown fields, from a later version or mistyped: {', '.join(unknown)}")
    fresh = [
        *(f"model.{name}" for name in known - section.keys()),
        *(f"reward.{name}" for name in set(REWARD_SHAPE) - shape.keys()),
        *(defaults.keys() - stored.keys()),
    ]
    if section.get("attention") == "causal":
        section = {"critic": False, "sampler": False, **section}  # heads that no causal model has
    if "layers" in shape:
        shape = {"reach": 0, **shape, "layers": tuple(shape["layers"])}
    chosen = {**defaults, **stored}
    model = GPT(
        ModelSection(**section),
        Vocabulary(base_size),
        mode=mode or chosen["mode"],
        block_size=block_size,
        reward=reward or RewardSection(**shape),
        num_classes=chosen["num_classes"],
        gelu=chosen["gelu"],
    )
    return model, sorted(fresh)


def _part(name: str) -> str:
    """The part of a GPT that is present or absent as a whole: trunk, heads.lm.residual, heads.<name>."""
    if name.startswith("heads.lm.residual."):
        return "heads.lm.residual"
    return ".".join(name.split(".")[:2]) if name.startswith("heads.") else name.split(".")[0]


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with a storage of its own: safetensors refuses shared memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _pack(tree: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """A tree as JSON; its tensors go into `tensors` under their path."""
    if isinstance(tree, Tensor):
        tensors[path] = tree
        return {"$tensor": path}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) in (list, tuple):
        packed = [_pack(item, tensors, f"{path}.{index}") for index, item in enumerate(tree)]
        return packed if type(tree) is list else {"$tuple": packed}
    if isinstance(tree, dict):
        if all(type(key) is str and not key.startswith("$") for key in tree):
            return {key: _pack(item, tensors, f"{path}.{key}") for key, item in tree.items()}
        pairs = [[_pack(key, tensors, path), key, item] for key, item in tree.items()]
        return {"$items": [[packed, _pack(item, tensors, f"{path}.{key}")] for packed, key, item in pairs]}
    raise ValueError(f"{path} cannot be saved: {type(tree).__name__} is no tensor, number, string, list, tuple or dict")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(_unpack(item, tensors) for item in tree["$tuple"])
    if "$items" in tree:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in tree["$items"]}
    return {key: _unpack(item, tensors) for key, item in tree.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: use an earlier checkpoint") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Copies, which leave the file unmapped: on NFS the folder of a mapped file cannot be deleted, and a resumed run
    deletes the checkpoint that it began from."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: use an earlier checkpoint") from error
