"""Write token datasets: split text without overlap, and lay it out as memory-mappable Arrow shards.

A dataset is a folder: `meta.json`, the tokenizer, and shards `<split>-<piece>-<segment>.arrow`, each one record batch
with one list column of tokens. A row is a document (layout `documents`), or a run of contiguous text (`blocks`).

1. The corpus is split by content: in layout `blocks` it is cut into chunks, which go to validation, judge or train by
   the rank of their keyed hash, so that all splits share one distribution and their shares are exact. Neighbouring
   chunks of one split form one run; a window never leaves its run, so no window reaches into another split. (What
   a corpus says twice may still stand in two splits.)
2. Equal documents of one segment share a hash, hence a split; a chunk's hash holds its number too, so that a corpus
   that repeats itself still splits.
3. In layout `documents` only the first `block_size` tokens of a document are kept; `truncated` counts such documents.
4. A folder is written below a temporary name, synced and renamed: half a dataset is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grpo.config import DataSection
from grpo.files import flush
from grpo.tokenizer import Tokenizer

FORMAT = 1
SPLITS = ("train", "judge", "validation")
SEGMENT_BYTES = 32 * 2**20
CHUNK_BLOCKS, CHUNK_BYTES = 8, 4096
TOKENIZER_KEY = b"tokenizer"


STALE_S = 24 * 3600.0
"""Seconds without a new file after which a temporary folder is a killed process's; living ones write many a minute."""


class partial_folder:
    """Context of a temporary folder beside `folder`, which takes its name on success and goes on failure; those of
    processes that were killed a day ago go too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for left in self.folder.parent.glob(f".{self.folder.name}-*"):
            with suppress(FileNotFoundError):  # another process clears it away
                if time.time() - left.stat().st_mtime > STALE_S:
                    shutil.rmtree(left, ignore_errors=True)
        self.partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        self.partial.chmod(0o755)
        return self.partial

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and not self.folder.exists():  # another process may have been faster; its data are the same
            try:
                self.partial.rename(self.folder)
                flush(self.folder.parent)
            except OSError:
                if not self.folder.exists():
                    raise
        shutil.rmtree(self.partial, ignore_errors=True)


def write_piece(
    documents: Iterable[str], section: DataSection, tokenizer: Tokenizer, folder: Path, piece: int
) -> list[dict[str, Any]]:
    """Tokenize, split and write a piece of the corpus, a segment of `SEGMENT_BYTES` characters at a time.

    Args:
        documents: the piece's texts, in order.
        folder: where the shards go.
        piece: its number, for the shards' names.

    Returns:
        One entry of meta.json per shard.
    """
    separator = tokenizer.encode_array(section.separator)
    dtype = np.min_scalar_type(tokenizer.vocabulary.base_size - 1)
    num_bytes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocabulary.base_size)])
    shards = []
    for segment, texts in enumerate(_segments(documents)):
        arrays = [array for text in texts if len(array := tokenizer.encode_array(text))]
        truncated = np.zeros(len(arrays), dtype=bool)
        if section.layout == "blocks":
            arrays = [array for document in arrays for array in (document, separator)]
        else:
            truncated = np.array([len(array) > section.block_size for array in arrays], dtype=bool)
            arrays = [array[: section.block_size] for array in arrays]
        values = np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        if section.layout == "blocks":
            lengths = _chunk_lengths(values.size, num_bytes[values].sum(), section)
        chosen = _assign(values, lengths, section)
        for index, split in enumerate(SPLITS):
            rows = lengths[chosen == index]
            if section.layout == "blocks":
                rows = _run_lengths(lengths, chosen, index)
            if rows.size:
                mine = values[np.repeat(chosen == index, lengths)]
                path = folder / f"{split}-{piece:05d}-{segment:04d}.arrow"
                shards.append(_write_shard(path, mine, rows, tokenizer) | {
                    "split": split, "bytes": int(num_bytes[mine].sum()),
                    "blocks": int((rows // section.block_size).sum()) if section.layout == "blocks" else len(rows),
                    "truncated": int(truncated[chosen == index].sum()) if section.layout == "documents" else 0})
    return shards


def finish_dataset(
    folder: Path,
    section: DataSection,
    tokenizer: Tokenizer,
    shards: list[dict[str, Any]],
    sources: list[dict[str, str]],
) -> None:
    """Check that every split holds something to read, and write the tokenizer and meta.json beside the shards.

    Args:
        shards: entries of `write_piece`, in the order of the corpus.
        sources: name and sha256 of each file.
    """
    counted = ("tokens", "bytes", "rows", "blocks", "truncated")
    splits = {split: {key: sum(s[key] for s in shards if s["split"] == split) for key in counted} for split in SPLITS}
    total = sum(counts["tokens"] for counts in splits.values())
    name = sources[0]["name"] if len(sources) == 1 else section.source
    if not total:
        raise ValueError(f"data.source: {name} holds no text: give a source with at least a few blocks of text")
    needed = [s for s in SPLITS if s == "train" or getattr(section, f"{s}_fraction") > 0]
    for split in needed:
        if not splits[split]["blocks"]:
            remedy = (f"{len(needed)} different documents or more" if section.layout == "documents" else
                      f"{len(needed)} blocks of data.block_size={section.block_size} or more, or smaller ones")
            raise ValueError(f"data.source: {name} is too short ({total} tokens), no row for {split}: use {remedy}")
    tokenizer.save(folder)
    meta = {"format": FORMAT, "section": asdict(section),
            "tokenizer": {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint,
                          "base_size": tokenizer.vocabulary.base_size},
            "split_seed": section.split_seed, "splits": splits, "sources": sources, "shards": shards}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        flush(path)


def _segments(documents: Iterable[str]) -> Iterator[list[str]]:
    texts, size = [], 0
    for document in documents:
        texts.append(document)
        size += len(document)
        if size >= SEGMENT_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _chunk_lengths(num_tokens: int, num_bytes: int, section: DataSection) -> np.ndarray:
    """Chunks of 8 blocks and 4096 bytes at least, or smaller ones, down to a block, that give each split two."""
    if not num_tokens:
        return np.empty(0, np.int64)
    smallest = min(f for f in (section.validation_fraction, section.judge_fraction) if f > 0)
    wanted = max(CHUNK_BLOCKS * section.block_size, CHUNK_BYTES * num_tokens // max(1, num_bytes))
    blocks = max(1, min(wanted, int(num_tokens * smallest / 2)) // section.block_size)
    lengths = np.full(max(1, num_tokens // (blocks * section.block_size)), blocks * section.block_size, dtype=np.int64)
    lengths[-1] += num_tokens - lengths.sum()
    return lengths


def _assign(values: np.ndarray, lengths: np.ndarray, section: DataSection) -> np.ndarray:
    """[R] index into SPLITS: the lowest hashes are validation, the next judge, the others train."""
    key = section.split_seed.to_bytes(16, "little", signed=True)
    ends = np.cumsum(lengths)
    contents = [values[end - length:end].tobytes() for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    salts = [b"%d " % i if section.layout == "blocks" else b"" for i in range(len(lengths))]
    digests = [hashlib.blake2b(salt + content, digest_size=8, key=key).digest()
               for salt, content in zip(salts, contents, strict=True)]
    hashes = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
    ranked, rows, has_judge = np.sort(hashes), len(hashes), section.judge_fraction > 0
    if rows < 2 + has_judge:
        return np.zeros(rows, dtype=np.int64)
    validation = min(max(1, round(section.validation_fraction * rows)), rows - 1 - has_judge)
    judge = min(max(1, round(section.judge_fraction * rows)), rows - 1 - validation) if has_judge else 0
    chosen = np.where(hashes < ranked[validation + judge], SPLITS.index("judge"), SPLITS.index("train"))
    return np.where(hashes < ranked[validation], SPLITS.index("validation"), chosen)


def _run_lengths(lengths: np.ndarray, chosen: np.ndarray, index: int) -> np.ndarray:
    """Lengths of the runs of neighbouring chunks that went to split `index`."""
    first = np.flatnonzero(np.diff(chosen, prepend=-1))
    return np.add.reduceat(lengths, first)[chosen[first] == index] if len(first) else lengths


def _write_shard(path: Path, values: np.ndarray, lengths: np.ndarray, tokenizer: Tokenizer) -> dict:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
    schema = pa.schema([("tokens", rows.type)], metadata={TOKENIZER_KEY: tokenizer.fingerprint.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([rows], schema=schema))
    data = sink.getvalue()
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    return {"file": path.name, "rows": len(lengths), "tokens": int(values.size), "size_bytes": data.size,
            "sha256": hashlib.sha256(data).hexdigest()}
