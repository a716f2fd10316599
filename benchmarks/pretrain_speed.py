"""How fast is a pretraining step, beside Hugging Face's GPT-2 of the same shape and the machine's own limit?

1. 4 layers, 4 heads, width 128, 16 rows of 256 tokens, vocabularies of 256 and 8,192 (ours padded by 64 for [MASK] and
   pad), float32: our step of the default objective (corruption, corrective loss, clipping, AdamW) and, beside it, our
   causal one, against forward with labels, backward, clipping and fused AdamW of `GPT2LMHeadModel`, in turns.
   Layout as in GPT-2: learned positions, biases.
2. Share of the limit: 6 layers of width 384 with their default layout. Floating-point operations of the products that
   the step cannot do without (forward and backward: 6 per weight and token; attention 12 x T per width, layer and
   token), over the seconds of the step, over the rate of large matrix products in the same turns.

Run: python benchmarks/pretrain_speed.py [--quick] [--seeds N]; transformers comes with `make test` or `make peers`. The
last line is one JSON object: `ratio_vs_hf_v256`, `ratio_vs_hf_v8192`, `limit_share`, the same ratios of the causal
step, and tokens/s.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from actors.pretrainer import Pretrainer
from benchmarks.speed import alternate, matmul_rate, ratio, require_peer, run
from grpo.config import Config, DataSection, ModelSection, PretrainSection, RunSection
from grpo.data import Batch
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

ROWS, COLUMNS = 16, 256
GPT2_LAYOUT = {"n_layer": 4, "n_head": 4, "n_embd": 128, "position": "learned", "bias": True}


def our_step(seed: int, vocabulary: int, rows: int, *, device: str = "cpu", dtype: str = "float32",
             columns: int = COLUMNS, **layout: object) -> tuple[Callable[[], object], GPT]:
    """An optimizer step of a `Pretrainer` on random text, at the curriculum's end; and its model."""
    config = Config(
        run=RunSection(seed=seed),
        data=DataSection(block_size=columns),
        model=ModelSection(critic=False, sampler=False, **layout),
        pretrain=PretrainSection(batch_size=rows, dtype=dtype, steps=20_000),
    )
    torch.manual_seed(seed)
    model = GPT(config.model, Vocabulary(vocabulary), block_size=columns)
    trainer = Pretrainer(model, config, device=device)
    text = random_text(vocabulary, rows, columns)
    batch = Batch(text, torch.ones_like(text, dtype=torch.bool))
    steps = itertools.count(10_000)
    return lambda: trainer.step(next(steps), batch), model


def random_text(vocabulary: int, rows: int, columns: int) -> Tensor:
    return torch.randint(0, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(0))


def peer_step(seed: int, vocabulary: int) -> Callable[[], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=COLUMNS, n_embd=128, n_layer=4, n_head=4,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text = random_text(vocabulary, ROWS, COLUMNS)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=text, labels=text).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def needed_flops(model: GPT, rows: int, columns: int) -> float:
    """Floating-point operations of the products in one training step."""
    trunk, shape = model.trunk, model.model
    weights = sum(p.numel() for p in trunk.blocks.parameters() if p.dim() == 2) + trunk.wte.weight.numel()
    return rows * columns * (6 * weights + 12 * columns * shape.n_embd * shape.n_layer)


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    require_peer("transformers", "benchmarks/pretrain_speed.py")
    figures, turns = {}, 5 if args.quick else 15
    for vocabulary in (256, 8192):
        times = alternate(
            {
                "peer": peer_step(seed, vocabulary),
                "ours": our_step(seed, vocabulary, ROWS, **GPT2_LAYOUT)[0],
                "causal": our_step(seed, vocabulary, ROWS, attention="causal", **GPT2_LAYOUT)[0],
            },
            turns,
        )
        figures |= {
            f"ratio_vs_hf_v{vocabulary}": ratio(times["peer"], times["ours"]),
            f"ratio_causal_vs_hf_v{vocabulary}": ratio(times["peer"], times["causal"]),
            f"tokens_per_s_v{vocabulary}": ROWS * COLUMNS / statistics.median(times["ours"]),
            f"hf_tokens_per_s_v{vocabulary}": ROWS * COLUMNS / statistics.median(times["peer"]),
        }
        print(f"{vocabulary} tokens of vocabulary: " + ", ".join(
            f"{name} {1e3 * statistics.median(each):.0f} ms" for name, each in times.items()), flush=True)
    rows = 8
    step, model = our_step(seed, 256, rows, n_layer=6, n_head=6, n_embd=384)
    rates: list[float] = []
    times = alternate({"limit": lambda: rates.append(matmul_rate()), "ours": step}, 3 if args.quick else 8)
    flops = needed_flops(model, rows, COLUMNS)
    limit = max(rates)
    return figures | {
        "limit_share": flops / min(times["ours"]) / limit,
        "limit_gflops": limit / 1e9,
    }


if __name__ == "__main__":
    run(__doc__, measure)
