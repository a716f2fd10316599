"""Tokenize the text source into memory-mapped Arrow shards, on Ray Data.

1. The source is planned as pieces of about 32 MiB. Each task reads, tokenizes, splits and writes its pieces; only their
   counts travel to the driver, so the corpus may be larger than any memory. Pieces depend on the source alone, so the
   dataset is the same on any cluster.
2. The folder's name is the hash of the data section and of the sources' content: an unchanged source is not tokenized
   again, an edited one gets a new folder. Digests are remembered in `run.cache` (`grpo/sources.py`). A reused folder is
   verified against its checksums, once per process.
3. BPE is trained in the driver, on at most 16 MiB drawn from up to 16 places of the corpus (all splits).
4. On a cluster of several machines, sources and `run.cache` must lie on storage that all of them see.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/prepare.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import dataclasses
import json
import logging
import random
import shlex
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from grpo.config import Config, DataSection
from grpo.config_file import config_hash, save_config
from grpo.data import open_dataset
from grpo.files import write_json
from grpo.shards import FORMAT, SPLITS, finish_dataset, partial_folder, write_piece
from grpo.sources import PART_BYTES, Part, plan_parts, read_part, source_digests
from grpo.tokenizer import TRAINING_BYTES, Tokenizer, build_tokenizer, tokenizer_path
from pipelines.launch import launch, start_ray
from pipelines.progress import Display, follow, overdue, summary_table
from pipelines.run_folder import run_folder

SAMPLE_PLACES = 16
_whole: set[Path] = set()
"""Datasets that this process has made or verified."""


def prepare(data: DataSection, cache: str, display: Display | None = None) -> Path:
    """The folder of the prepared dataset; made on Ray Data when the cache does not hold it yet.

    Args:
        data: what to read and how.
        cache: folder of prepared datasets (`run.cache`).
        display: where progress goes, already entered; None: nowhere.

    Raises:
        ValueError: the source is missing, damaged, empty, too short or without the text column; or the cached
            dataset is damaged.
    """
    display = display or Display(Console(quiet=True))
    kept = Path(cache).expanduser().absolute()
    sources = source_digests(data.source, kept)
    folder = kept / f"data-{_key(data, sources)}"
    if folder.exists():
        open_dataset(folder, verify=folder not in _whole)
        _whole.add(folder)
        return folder
    parts = plan_parts(data.source, data.separator)
    tokenizer = build_tokenizer(data.tokenizer, _sample(parts, data, display))
    with partial_folder(folder) as partial:
        shards = _write_on_ray(_pieces(parts), data, tokenizer, partial, display)
        finish_dataset(partial, data, tokenizer, shards, sources)
    _whole.add(folder)
    return folder


def _key(data: DataSection, sources: list[dict[str, str]]) -> str:
    content = [(Path(source["name"]).suffix, source["sha256"]) for source in sources]
    tokenizer = build_tokenizer(data.tokenizer).fingerprint if tokenizer_path(data.tokenizer) else data.tokenizer
    return config_hash(dataclasses.replace(data, source="", tokenizer=tokenizer), content, FORMAT)


def _sample(parts: list[Part], data: DataSection, display: Display) -> Iterator[str]:
    """Documents for BPE training: an equal share of the training bytes from each of several places."""
    display.note(f"training the tokenizer {data.tokenizer}")
    share = TRAINING_BYTES // min(SAMPLE_PLACES, max(1, len(parts)))
    for part in random.Random(0).sample(parts, len(parts)):
        size = 0
        for document in read_part(part, data.text_column, data.separator):
            yield document
            size += len(document.encode("utf-8", "replace"))
            if size >= share:
                break


def _pieces(parts: list[Part]) -> list[list[Part]]:
    """Neighbouring parts joined up to `PART_BYTES`, so that small files share a task (and their splits' shares)."""
    pieces: list[list[Part]] = []
    size = 0
    for part in parts:
        if not pieces or size + part.num_bytes > PART_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(part)
        size += part.num_bytes
    return pieces


def _write_on_ray(
    pieces: list[list[Part]], data: DataSection, tokenizer: Tokenizer, folder: Path, display: Display
) -> list[dict[str, Any]]:
    """Write all pieces in Ray Data tasks; returns the shards' entries in the order of the corpus."""
    start_ray()
    import ray.data

    def write(row: dict[str, Any]) -> dict[str, Any]:
        piece = int(row["id"])
        if not folder.is_dir():
            lost = f"run.cache: not every node sees {folder}: set run.cache to storage that all nodes share"
            return {"piece": piece, "shards": "[]", "error": lost}
        documents = (text for part in pieces[piece] for text in read_part(part, data.text_column, data.separator))
        try:
            shards, error = write_piece(documents, data, tokenizer, folder, piece), ""
        except ValueError as mistake:  # what a user wrote travels as data: Ray Data would wrap it in a traceback
            shards, error = [], str(mistake)
        return {"piece": piece, "shards": json.dumps(shards), "error": error}

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    written: dict[int, list[dict[str, Any]]] = {}
    if pieces:
        tasks = ray.data.range(len(pieces), override_num_blocks=len(pieces)).map(write)
        shown = follow(overdue("the first piece of text to be tokenized", lambda: bool(written)), display)
        with shown:
            for row in tasks.iter_rows():
                if row["error"]:
                    raise ValueError(row["error"])
                written[row["piece"]] = json.loads(row["shards"])
                display.phase("tokenizing", len(written), len(pieces))
    return [shard for piece in sorted(written) for shard in written[piece]]


def _next(args: argparse.Namespace) -> str:
    """The command that pretrains on what was prepared."""
    asked = [override for override in args.overrides if not override.startswith("run.name=")]
    return shlex.join(["python", "pipelines/pretrain.py", *(["--config", args.config] if args.config else []), *asked])


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    run = run_folder(config.run, f"prepare-{config_hash(config.data)}")
    with Display() as display:
        folder = prepare(config.data, config.run.cache, display)
    dataset = open_dataset(folder)
    run.mkdir(parents=True, exist_ok=True)
    summary = {"folder": str(folder), "seconds": round(time.monotonic() - started, 2), "splits": dataset.meta["splits"],
               "tokenizer": dataset.meta["tokenizer"], "sources": dataset.meta["sources"]}
    write_json(run / "summary.json", summary)
    save_config(config, run / "config.yaml")
    rows = [[split, dataset.num_tokens(split), dataset.num_bytes(split), dataset.bytes_per_token(split),
             dataset.meta["splits"][split]["rows"]] for split in SPLITS]
    summary_table(f"{dataset.meta['tokenizer']['kind']} tokens, vocabulary {dataset.vocabulary.base_size}", rows,
                  ["split", "tokens", "bytes", "bytes per token", "rows"])
    print(f"dataset  {folder}\nsummary  {run / 'summary.json'}\n"
          f"next     {_next(args)}")
    return summary


if __name__ == "__main__":
    launch(main, __doc__)
