"""Write text with a checkpoint, and watch it denoise.

    python pipelines/sample.py --checkpoint runs/NAME --prompt "The" denoise.steps=8 --live --html text.html

1. The checkpoint's own config is the default of every setting but `run.name`; `--config` replaces it, overrides change
   single values. Texts and settings go to `runs/sample-HASH`, or to the `run.name` of the command line.
2. Bidirectional checkpoints denoise (`grpo/denoise.py`), causal ones continue token by token (`grpo/autoregress.py`)
   and have no steps to watch.
3. `--live` shows the first text; without it a bar counts the steps, or a causal model's tokens. The page of `--html`
   holds all texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/sample.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from actors.torch_setup import set_up_torch
from grpo.autoregress import generate
from grpo.checkpoint import load_checkpoint, load_model, load_tokenizer
from grpo.completion import load_remasking_model
from grpo.config import Config
from grpo.config_file import config_hash, save_config
from grpo.denoise import StepRecord, denoise
from grpo.files import write_json
from grpo.mask_bias import saved_bias
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.remasking import resolve_policy
from grpo.run_checkpoints import find_checkpoint
from grpo.tokenizer import Tokenizer
from pipelines.denoising_page import write_page
from pipelines.launch import checkpoint_config, launch
from pipelines.live_view import Recorder, counts, legend, render
from pipelines.progress import Display
from pipelines.run_folder import check_file, run_folder

SAMPLE_STREAM = 41
"""Keeps this pipeline's noise apart from that of rollouts and evaluation."""
START = "\n"
"""What a causal model continues when no prompt is given."""


def prompt_tokens(text: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """[P] int64.

    Raises:
        ValueError: the prompt leaves nothing to write.
    """
    tokens = tokenizer.encode(text)
    if len(tokens) >= length:
        raise ValueError(f"--prompt has {len(tokens)} tokens and --length is {length}: raise --length or shorten it")
    return torch.tensor(tokens, dtype=torch.int64)


@contextlib.contextmanager
def shown(recorder: Recorder, console: Console, delay: float) -> Iterator[Callable[[StepRecord], None]]:
    """Draws the first text at each step as it is made: in place in a terminal, as plain lines elsewhere."""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def on_step(record: StepRecord) -> None:
        for frame in recorder(record):
            if live is None:
                console.print(f"{frame.title}: {counts(frame)}", Text("".join(frame.pieces)), sep="\n")
            else:
                panel = Panel(render(frame), title=frame.title, subtitle=counts(frame))
                live.update(Group(panel, legend()), refresh=True)
                time.sleep(delay)

    with live or contextlib.nullcontext():
        yield on_step


@contextlib.contextmanager
def counted(recorder: Recorder | None, console: Console, steps: int) -> Iterator[Callable[[StepRecord], None]]:
    """A bar of the steps; the recorder, if there is one, keeps each."""
    with Display(console) as display:

        def on_step(record: StepRecord) -> None:
            if recorder:
                recorder(record)
            display.phase("steps", record.step + 1, steps)

        yield on_step


def write(
    model: GPT, tokenizer: Tokenizer, config: Config, prompt: Tensor, args: argparse.Namespace, *, mask_bias: float,
    console: Console,
) -> tuple[Tensor, Recorder | None]:
    """[num, length] int64 texts, and what was recorded of their denoising."""
    device, length = prompt.device, args.length or config.data.block_size
    seeds = row_seeds(config.run.seed, SAMPLE_STREAM, 0, torch.arange(args.num, device=device))
    settings = config.denoise
    if model.trunk.causal:
        if not len(prompt):
            prompt = prompt_tokens(START, tokenizer, length).to(device)
        num_new = length - len(prompt)
        with Display(console) as display:
            texts = generate(model, prompt.expand(args.num, -1), num_new=num_new, seeds=seeds,
                             temperature=settings.temperature, top_p=settings.top_p,
                             on_token=lambda done: display.phase("tokens", done, num_new))
        return texts, None
    masked = prompt.new_full((args.num, length), tokenizer.vocabulary.mask_id)
    masked[:, : len(prompt)] = prompt
    remasking_model = load_remasking_model(settings, tokenizer=tokenizer, device=device)
    policy = resolve_policy(settings.remasking, model, remasking_model)
    recorder = Recorder(tokenizer, settings.steps) if args.live or args.html else None
    with shown(recorder, console, args.delay) if args.live else counted(recorder, console, settings.steps) as on_step:
        texts = denoise(
            model, masked, seeds=seeds, steps=settings.steps, schedule=settings.schedule,
            temperature=settings.temperature, top_p=settings.top_p, remasking=policy, randomness=settings.randomness,
            sampler=settings.sampler, min_neighbors_ratio=config.sampler.min_neighbors_ratio,
            mask_bias=mask_bias, remasking_model=remasking_model, on_step=on_step, record=recorder is not None,
        )
    return texts, recorder


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Write the texts, show them, and leave them in the run's folder."""
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if args.length < 0:
        raise ValueError(f"--length must be at least 1, or 0 for data.block_size, got {args.length}")
    args.prompt = args.prompt.encode(errors="surrogateescape").decode(errors="replace")  # what is no text: U+FFFD
    folder = find_checkpoint(args.checkpoint, "--checkpoint")
    checkpoint = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_up_torch(device)
    model = load_model(folder, device=device).eval()
    if model.mode != "language_model":
        raise ValueError(f"--checkpoint {args.checkpoint} is a {model.mode}, which writes no text; give a generator's")
    if (args.html or args.live) and model.trunk.causal:
        raise ValueError(f"{'--html' if args.html else '--live'} shows denoising steps, which a causal checkpoint does "
                         "not have: leave it out")
    if args.html:
        check_file(Path(args.html), "--html")
    asked = config_hash(config, str(folder), args.prompt, args.num, args.length)
    run = run_folder(config.run, f"sample-{asked}", caches=False)
    console = Console()
    prompt = prompt_tokens(args.prompt, tokenizer, args.length or config.data.block_size).to(device)
    start = time.perf_counter()
    mask_bias = saved_bias(checkpoint.state, config.mask_bias)
    texts, recorder = write(model, tokenizer, config, prompt, args, mask_bias=mask_bias, console=console)
    seconds = time.perf_counter() - start

    texts = texts.cpu()
    written = [tokenizer.decode(row) for row in texts]
    for number, text in enumerate(written, start=1):
        console.print(Panel(Text(text), title=f"{number} of {args.num}", title_align="left"))
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")
    summary = {"checkpoint": str(folder), "prompt": args.prompt, "texts": written, "num_tokens": texts.numel(),
               "seconds": seconds}
    write_json(run / "summary.json", summary)
    console.print(f"texts and settings: {run}")
    if args.html:
        s = config.denoise
        settings = (f"{s.steps} steps, {s.schedule} schedule, temperature {s.temperature}, top_p {s.top_p}, re-masking "
                    f"{s.remasking}, randomness {s.randomness}, {'wavefront' if s.sampler else 'parallel'} fill")
        samples = [recorder.sample(row, texts) for row in range(args.num)]
        write_page(Path(args.html), samples, f"Denoising with {folder}", settings)
        console.print(f"denoising page: {args.html}")
    return summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a checkpoint's folder, or its run's")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--num", type=int, default=4, help="how many texts (default: 4)")
    parser.add_argument("--length", type=int, default=0, help="tokens of each, prompt included (default: block_size)")
    parser.add_argument("--live", action="store_true", help="show the first text denoising in the terminal")
    parser.add_argument("--delay", type=float, default=0.5, help="seconds between live frames (default: 0.5)")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page that plays the denoising of all texts")


if __name__ == "__main__":
    launch(main, __doc__, base=checkpoint_config, arguments=add_arguments)
