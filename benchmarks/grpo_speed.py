"""How fast is one adversarial GRPO round of a causal generator, beside TRL's GRPOTrainer on the same work?

Both sides: a GPT-2 layout of 4 layers, 4 heads, width 128 (858,880 parameters; ours 8,192 more, for [MASK], pad and
padding), a reward model of the same size, 4 prompts of 32 tokens x 8 completions of exactly 96, KL 0.04 against a
reference, 1 and 4 inner iterations, float32, the same threads. TRL takes a step, then this project a round, in turns in
one process.

1. Our round is a whole adversarial one: rollout, scores, features of 32 natural texts, generator phase with its anchor
   on natural text, and one reward step on all 64 texts. TRL's reward model never trains.
2. Our trunk is frozen, so the update trains heads on cached states; TRL's trains the whole policy. That is what the
   design is for, and what the ratio shows.
3. TRL: no gradient checkpointing, no bfloat16 (slower on this CPU), `loss_type="grpo"`; a step is what lies between
   `on_step_begin` and `on_step_end`, generation included, loading of data excluded.

Run: python benchmarks/grpo_speed.py [--quick] [--seeds N] in the peers' environment (`make peers`). The last line is
one JSON object: `ratio_vs_trl_1`, `ratio_vs_trl_4` and seconds of both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import speed
from benchmarks.adversarial import Adversary
from benchmarks.models import TINY, dataset_of
from benchmarks.speed import ratio, require_peer, run, seconds
from grpo.config_file import load_config
from grpo.model import GPT

PROMPT, NEW, PROMPTS, GROUP = 32, 96, 4, 8
SIZES = [
    "model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.attention=causal", "model.position=learned",
    "model.bias=true", "model.critic=false", "model.sampler=false", f"data.block_size={PROMPT + NEW}",
    f"grpo.prompt_tokens={PROMPT}", f"grpo.prompts={PROMPTS}", f"grpo.group_size={GROUP}", "grpo.rollout_actors=1",
    "grpo.kl=0.04", f"reward.batch_size={2 * PROMPTS * GROUP}", "reward.min_steps=1", "reward.max_steps=1",
]


def adversary(args: argparse.Namespace, seed: int, *overrides: str) -> Adversary:
    """Our side, on an untrained base: a round costs the same whatever the weights."""
    config = load_config(TINY, [f"run.seed={seed}", f"run.cache={args.cache}", *SIZES, *overrides])
    dataset = dataset_of(config)
    torch.manual_seed(seed)
    base = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size).eval()
    return Adversary(config, dataset, base, threads=args.threads)


def trl_steps(folder: str, seed: int, iterations: int, steps: int, after_step: Callable[[float], None]) -> None:
    """Train with TRL for some optimizer steps; `after_step(seconds)` is called between them."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        TrainerCallback,
        logging,
    )
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    letters = [chr(0x4E00 + i) for i in range(256)]  # one character per token, so that text survives a round trip
    words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=letters[254], pad_token=letters[255], padding_side="left"
    )
    shape = {"vocab_size": 256, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4, "bos_token_id": None,
             "eos_token_id": 254, "pad_token_id": 255}
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)  # the trainer loads its reference from there
    rows = torch.randint(0, 254, (PROMPTS * steps, PROMPT)).tolist()

    class Clock(TrainerCallback):
        def on_step_begin(self, *unused, **also_unused) -> None:
            self.started = speed.clock()

        def on_step_end(self, *unused, **also_unused) -> None:
            after_step(speed.clock() - self.started)

    trainer = GRPOTrainer(
        model=GPT2LMHeadModel.from_pretrained(folder),
        reward_funcs=GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1)),
        args=GRPOConfig(
            output_dir=folder, seed=seed, per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW}, beta=0.04, loss_type="grpo",
            num_iterations=iterations, max_steps=steps, learning_rate=1e-4, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=10_000,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "".join(letters[i] for i in row)} for row in rows]),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    require_peer("trl", "benchmarks/grpo_speed.py")
    warnings.simplefilter("ignore")
    figures = {}
    for iterations, rollouts in ((1, 5 if args.quick else 16), (4, 4 if args.quick else 10)):
        ours = adversary(args, seed, f"grpo.num_iterations={iterations}")
        rounds, our_s, trl_s, part_s = itertools.count(), [], [], []

        def after_step(taken: float, iterations: int = iterations, ours: Adversary = ours,
                       rounds: itertools.count = rounds, our_s: list[float] = our_s, trl_s: list[float] = trl_s,
                       part_s: list[float] = part_s) -> None:
            part_s.append(taken)
            if len(part_s) == iterations:  # TRL has used its rollout up: our turn
                trl_s.append(sum(part_s))
                part_s.clear()
                our_s.append(seconds(lambda: ours.round(next(rounds))))

        with tempfile.TemporaryDirectory() as folder:
            trl_steps(folder, seed, iterations, iterations * rollouts, after_step)
        figures |= {
            f"ratio_vs_trl_{iterations}": ratio(trl_s[1:], our_s[1:]),  # the first of each warms up
            f"seconds_{iterations}": statistics.median(our_s[1:]),
            f"trl_seconds_{iterations}": statistics.median(trl_s[1:]),
        }
        print(f"{iterations} inner iterations: TRL {figures[f'trl_seconds_{iterations}']:.2f} s, "
              f"ours {figures[f'seconds_{iterations}']:.2f} s", flush=True)
    return figures


if __name__ == "__main__":
    run(__doc__, measure)
