"""Weights in the layout of GPT-2: a local folder with `config.json` and `model.safetensors`, as transformers saves it.

1. Its linear layers are stored transposed ([in, out]) and are turned round.
2. `<|endoftext|>`, its last id, is no text: the tokenizer `gpt2` leaves it out, so that [MASK] takes its place (50256)
   and its embedding, and pad the next one. A causal generator is shown neither, and draws neither.
3. Pad and the padding of the vocabulary, which GPT-2 has not, get zero embeddings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from grpo.checkpoint import load_into
from grpo.config import ModelSection
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
REQUIRED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Settings that change the computation; a file without one means this value."""
SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
"""Settings that a file must have."""
END_OF_TEXT = 50256
"""Its id in a file that does not say."""
NAMES = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def load_gpt2(folder: str | Path, block_size: int | None = None) -> GPT:
    """A causal generator with GPT-2's weights; its text ids are the file's but for a final `<|endoftext|>`.

    Args:
        block_size: T of what it will read, `data.block_size`; later positions are left out. All when None.

    Raises:
        ValueError: files are missing or damaged, or the configuration is none that this model computes,
            or has fewer positions.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} must hold config.json and model.safetensors, as save_pretrained writes them: {error}"
        ) from error
    _check(folder, config)
    section = ModelSection(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=config["n_embd"],
        attention="causal",
        position="learned",
        bias=True,
        critic=False,
        sampler=False,
    )
    ids, positions = config["vocab_size"], config["n_positions"]
    vocabulary = Vocabulary(ids - (config.get("eos_token_id", END_OF_TEXT) == ids - 1))
    block_size = block_size or positions
    if block_size > positions:
        raise ValueError(f"block_size must be at most {positions}, the positions of {folder}, got {block_size}")
    gelu = GELUS[config.get("activation_function", "gelu_new")]
    model = GPT(section, vocabulary, block_size=block_size, gelu=gelu)
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    if config.get("tie_word_embeddings", True):
        stored.pop("lm_head.weight", None)
    tensors = dict(_renamed(name, tensor, vocabulary) for name, tensor in stored.items() if not _is_buffer(name))
    if "trunk.wpe.weight" in tensors:
        tensors["trunk.wpe.weight"] = tensors["trunk.wpe.weight"][:block_size]
    model.to(tensors["trunk.wte.weight"].dtype)
    try:
        load_into(model, tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return model


def _check(folder: Path, config: dict[str, Any]) -> None:
    missing = [key for key in SHAPE if not isinstance(config, dict) or not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"{folder / 'config.json'} is no GPT-2's: it gives no number for {', '.join(missing)}")
    for key, needed in REQUIRED.items():
        if config.get(key, needed) != needed:
            raise ValueError(f"{folder / 'config.json'}: {key} must be {needed!r}, got {config[key]!r}")
    gelu = config.get("activation_function", "gelu_new")
    if gelu not in GELUS:
        known = ", ".join(GELUS)
        raise ValueError(f"{folder / 'config.json'}: activation_function must be one of {known}, got {gelu!r}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"{folder / 'config.json'}: n_inner must be 4 n_embd, got {config['n_inner']!r}")


def _is_buffer(name: str) -> bool:
    """Causal masks that older files carry along."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _renamed(name: str, tensor: Tensor, vocabulary: Vocabulary) -> tuple[str, Tensor]:
    if name in ("wte.weight", "lm_head.weight"):
        new = "trunk.wte.weight" if name == "wte.weight" else "heads.lm.matrix"
        return new, F.pad(tensor, (0, 0, 0, vocabulary.size - len(tensor)))
    if name.startswith("ln_f."):
        return name.replace("ln_f", "trunk.norm"), tensor
    if name.startswith("h."):
        _, block, layer = name.split(".", 2)
        layer, kind = layer.rsplit(".", 1)
        if layer.startswith(("attn.c_", "mlp.c_")) and kind == "weight":
            tensor = tensor.T
        return f"trunk.blocks.{block}.{NAMES.get(layer, layer)}.{kind}", tensor
    return f"trunk.{name}", tensor
