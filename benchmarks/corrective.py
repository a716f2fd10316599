"""Is the corrective objective worth its price? Against plain MDLM, with the same model, steps and batches.

Three generators without critic or sampler: `mdlm`; `corrective` (uniform wrong words); and `corrective, own words`
(replacements drawn from the model's own predictions, for which every step has one more forward pass).

1. NELBO on held-out text, nats per token: what the corrective objective loses as a density model.
2. Repair: in held-out text 10 % of the tokens are replaced by wrong but plausible ones, drawn from the independent
   causal judge with the truth cut off. A model re-masks as many tokens as were planted (it is told their number, not
   their places) and fills them at temperature 0.5. It may find them by
       self         its own P(MASK) where a token stands, one forward pass (not trained for by mdlm)
       likelihood   the probability that it gives to the token that it sees, one forward pass
       hidden       the probability of each token while it is hidden, a quarter of the text at a time, four passes
       chance       no look
   `repaired`: planted tokens that are the truth again; `broken`: right tokens that became wrong, per planted one;
   `net` = repaired - broken; `caught`: planted tokens among the re-masked; `auroc` of finding them.
   The last line has those of `self` for corrective models and of the best single-pass way for mdlm, and of `hidden`.
3. `step_cost_*`: seconds of a training step over mdlm's, steps taken alternately.

Run: python benchmarks/corrective.py [--quick] [--seeds N] [--data FILE]. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import configure, dataset_of, generator, judge, load_generator, parse, print_table, summarise

# isort: split
import torch
from torch import Tensor

from actors.pretrainer import Pretrainer, validation_bound
from grpo.config import Config
from grpo.data import Batch, Cursor, Dataset, windows
from grpo.metrics import auroc
from grpo.model import GPT, text_logits
from grpo.noise import PROPOSE, REMASK, row_seeds, uniforms
from grpo.remasking import choose, log_mask_probability, log_wrong_from_confidence
from grpo.wavefront import propose

VARIANTS = {
    "mdlm": ["loss.objective=mdlm"],
    "corrective": [],
    "corrective, own words": ["corruption.own_predictions=1.0"],
}
WAYS = ("self", "likelihood", "hidden", "chance")
PLANTED = 0.1
FIRST_PLANTED = 8
"""The judge needs something to read before its words are plausible."""
HIDDEN_PARTS = 4


@torch.no_grad()
def plant(judge_model: GPT, text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """[B, T] text with wrong but plausible tokens, and [B, T] bool where."""
    vocabulary = judge_model.vocabulary
    column = torch.arange(text.shape[1])
    seeds = row_seeds(seed, 2, 0, torch.arange(len(text)))
    planted = (uniforms(seeds[:, None], 1, column) < PLANTED) & (column >= FIRST_PLANTED)
    before = text_logits(judge_model(text), vocabulary)[:, :-1]
    before = before.scatter(2, text[:, 1:, None], float("-inf"))
    cumulative = before.double().softmax(-1).cumsum(-1)
    noise = uniforms(seeds[:, None], 2, column[1:])[..., None] * cumulative[..., -1:]
    words = torch.searchsorted(cumulative, noise, right=True)[..., 0].clamp(max=vocabulary.base_size - 1)
    wrong = torch.cat([text[:, :1], words], 1)
    return torch.where(planted, wrong, text), planted & (wrong != text)


def doubts(model: GPT, text: Tensor, way: str, bias: float) -> Tensor:
    """[B, T] float64 log P(wrong) by one of `WAYS`."""
    if way == "chance":
        return torch.zeros(text.shape, dtype=torch.float64)
    if way == "self":
        return log_mask_probability(model, model.encode(text).flatten(0, 1), bias).view_as(text)
    parts = HIDDEN_PARTS if way == "hidden" else 1
    column, seen = torch.arange(text.shape[1]), torch.zeros(text.shape, dtype=torch.float64)
    for part in range(parts):
        shown = (column % parts == part).expand_as(text)
        inputs = text.masked_fill(shown, model.vocabulary.mask_id) if way == "hidden" else text
        logprobs = text_logits(model(inputs), model.vocabulary).log_softmax(-1)
        seen = torch.where(shown, logprobs.gather(2, text[..., None])[..., 0].double(), seen)
    return log_wrong_from_confidence(seen)


@torch.no_grad()
def repair(model: GPT, bias: float, clean: Tensor, text: Tensor, planted: Tensor, way: str, seed: int) -> dict:
    """Re-mask as many tokens as were planted, fill them, and count."""
    eligible = (torch.arange(text.shape[1]) >= FIRST_PLANTED).expand_as(text)
    seeds = row_seeds(seed, 3, 0, torch.arange(len(text)))
    doubt = doubts(model, text, way, bias)
    noise = uniforms(seeds[:, None], 0, REMASK, torch.arange(text.shape[1]))
    chosen, _ = choose(doubt, planted.sum(1), eligible, randomness=1.0 if way == "chance" else 0.0, noise=noise)
    row, column = chosen.nonzero(as_tuple=True)
    hidden = model.encode(text.masked_fill(chosen, model.vocabulary.mask_id))[row, column]
    drawn = propose(model, hidden, uniforms(seeds[row], 1, PROPOSE, column), temperature=0.5, top_p=1.0, record=False)
    after = text.masked_scatter(chosen, drawn.tokens)
    num = planted.sum()
    repaired, broken = (planted & (after == clean)).sum() / num, (~planted & (after != clean)).sum() / num
    return {"auroc": float(auroc(doubt[eligible], planted[eligible])), "caught": float((chosen & planted).sum() / num),
            "repaired": float(repaired), "broken": float(broken), "net": float(repaired - broken)}


def step_costs(configs: dict[str, Config], dataset: Dataset, repeats: int) -> dict[str, float]:
    """Seconds of a late training step of each variant over the first's, alternately, on this thread's own clock."""
    spent: dict[str, list[float]] = {name: [] for name in configs}
    trainers = {}
    for name, config in configs.items():
        trainers[name] = Pretrainer(GPT(config.model, dataset.vocabulary, block_size=config.data.block_size), config)
        cursor = Cursor(dataset, "train", config.pretrain.batch_size, config.data.block_size, config.run.seed)
    for repeat in range(repeats + 1):
        for name, trainer in trainers.items():
            batch = cursor.batch(repeat)
            start = time.process_time()
            trainer.step(trainer.config.pretrain.steps - 1, batch)
            spent[name] += [time.process_time() - start] if repeat else []
    first = statistics.median(spent["mdlm"])
    return {f"step_cost_{key(name)}": statistics.median(times) / first for name, times in spent.items()}


def key(variant: str) -> str:
    return variant.replace(", ", "_").replace(" ", "_")


def one_seed(configs: dict[str, Config], dataset: Dataset, quick: bool) -> tuple[dict[str, dict], dict[str, float]]:
    """Rows of the table, and figures."""
    seed = configs["mdlm"].run.seed
    rows: Batch = windows(dataset, "validation", 128 if quick else 512, configs["mdlm"].data.block_size, 1)
    text, planted = plant(judge(configs["mdlm"], dataset), rows.tokens, seed)
    table, figures = {}, step_costs(configs, dataset, 3 if quick else 7)
    for name, config in configs.items():
        model, bias = load_generator(generator(config, dataset))
        bound = validation_bound(model, rows, dataset.bytes_per_token("validation"))
        ways = {way: repair(model, bias, rows.tokens, text, planted, way, seed) for way in WAYS}
        table |= {f"{name}: {way}": {"nelbo": bound["val_nelbo_nats"], **row} for way, row in ways.items()}
        one_pass = ways["self"] if name != "mdlm" else max(ways["self"], ways["likelihood"], key=lambda w: w["net"])
        figures |= {f"nelbo_{key(name)}": bound["val_nelbo_nats"], f"bpb_{key(name)}": bound["val_bpb"],
                    f"net_hidden_{key(name)}": ways["hidden"]["net"]}
        figures |= {f"{figure}_{key(name)}": one_pass[figure] for figure in ("repaired", "broken", "net", "auroc")}
    return table, figures


def main() -> None:
    args = parse(__doc__)
    tables, runs = [], []
    for seed in range(args.seeds):
        length = [] if args.quick else ["pretrain.steps=400"]
        configs = {name: configure(args, seed, "model.critic=false", "model.sampler=false", *length, *changes)
                   for name, changes in VARIANTS.items()}
        table, figures = one_seed(configs, dataset_of(configs["mdlm"]), args.quick)
        tables.append(table)
        runs.append(figures)
    print_table("10 % planted", {name: [rows[name] for rows in tables] for name in tables[0]})
    print(json.dumps(summarise(runs) | {"seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
