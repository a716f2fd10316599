"""Open token datasets and read batches that are pure functions of (seed, step).

A dataset is a folder that grpo/shards.py lays out. Its shards are memory-mapped: ranks and actors on a machine share
one copy in the page cache, and a batch is one widening copy out of it.

1. The order of windows belongs to the run, not to ranks: a rank takes its rows of the global batch.
2. Each epoch reads every run of text from a random phase, so that over the epochs a token is seen at every position;
   the number of windows stays the same, so that the epoch of a step is a division.
3. `windows` are fixed, do not overlap, and start at phase 0.
"""


from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from grpo.config import DataSection
from grpo.shards import FORMAT, SPLITS, TOKENIZER_KEY, finish_dataset, partial_folder, write_piece
from grpo.tokenizer import Tokenizer, Vocabulary, build_tokenizer

VALIDATION_WINDOWS_SEED = 1
"""Seed of the validation rows on which models are compared: pretraining's bound and the measurements read the same."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens; padding is where the mask is False.

    Attributes:
        tokens: [B, T] int64.
        attention_mask: [B, T] bool, True at real tokens.
    """

    tokens: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.tokens.to(device, non_blocking=True), self.attention_mask.to(device, non_blocking=True))

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        return Batch(self.tokens[rows], self.attention_mask[rows])


def completion_mask(attention_mask: Tensor, prompt_tokens: int) -> Tensor:
    """[B, T] bool: real tokens after the prompt."""
    return attention_mask & (torch.arange(attention_mask.shape[1], device=attention_mask.device) >= prompt_tokens)


@dataclass(frozen=True)
class Split:
    """Rows of one split as views of the mapped shards.

    Attributes:
        values: one array of token ids per shard.
        shard, start, length: [R] int64, where each row lies.
    """

    values: tuple[np.ndarray, ...]
    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """An open dataset. Pickles as its folder, so that a worker maps the same pages."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    splits: dict[str, Split]

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def provenance(self) -> dict[str, Any]:
        """sha256 of each file of the text, in order, and of what was held out of the training split."""
        held_out = [shard["sha256"] for shard in self.meta["shards"] if shard["split"] != "train"]
        return {"sources": [source["sha256"] for source in self.meta["sources"]],
                "held_out": hashlib.sha256("".join(held_out).encode()).hexdigest()}

    def num_tokens(self, split: str) -> int:
        """Tokens of the split, pads not among them."""
        return self.meta["splits"][split]["tokens"]

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes that the split's tokens stand for."""
        return self.meta["splits"][split]["bytes"]

    def bytes_per_token(self, split: str) -> float:
        """Mean UTF-8 bytes of a token: nats per token / this / ln 2 are bits per byte."""
        return self.num_bytes(split) / max(1, self.num_tokens(split))

    def __reduce__(self) -> tuple:
        return open_dataset, (self.folder,)


def open_dataset(folder: str | Path, *, verify: bool = False) -> Dataset:
    """Map a prepared folder.

    Args:
        folder: what `make_dataset` or pipelines/prepare.py wrote.
        verify: also read every shard and compare its sha256.

    Raises:
        ValueError: something is missing, truncated, damaged, or written with another tokenizer.
    """
    folder = Path(folder).expanduser()
    remedy = f"delete {folder} and prepare the data again"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        shards, layout, fingerprint = meta["shards"], meta["section"]["layout"], meta["tokenizer"]["fingerprint"]
    except OSError as error:
        raise ValueError(f"{folder / 'meta.json'} is missing: prepare the data with pipelines/prepare.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged: {remedy}") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder / 'meta.json'} has format {meta.get('format')}, this code reads {FORMAT}: {remedy}")
    assert layout in ("blocks", "documents")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"{folder}: its tokenizer is not the one that its meta.json names: {remedy}")
    splits = {}
    for split in SPLITS:
        mine = [shard for shard in shards if shard["split"] == split]
        opened = [_open_shard(folder, shard, fingerprint, remedy, verify) for shard in mine]
        rows = [offsets.size - 1 for offsets, _ in opened]
        splits[split] = Split(
            values=tuple(values for _, values in opened),
            shard=np.repeat(np.arange(len(opened)), rows),
            start=np.concatenate([np.empty(0, np.int64), *(offsets[:-1] for offsets, _ in opened)]),
            length=np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for offsets, _ in opened)]),
        )
    return Dataset(folder, meta, tokenizer, splits)


def _open_shard(
    folder: Path, shard: dict[str, Any], fingerprint: str, remedy: str, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Row offsets [R + 1] and token values of a shard, both views of the mapped file."""
    path = folder / shard["file"]
    size = path.stat().st_size if path.exists() else 0
    if size != shard["size_bytes"]:
        raise ValueError(f"{path} is truncated or missing ({size} of {shard['size_bytes']} bytes): {remedy}")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        written_with = (reader.schema.metadata or {}).get(TOKENIZER_KEY, b"").decode()
        rows = reader.get_batch(0).column(0)
        rows.validate(full=True)
        offsets, values = rows.offsets.to_numpy(), rows.values.to_numpy()
    except (OSError, pa.ArrowException, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {remedy}") from error
    if written_with != fingerprint:
        raise ValueError(f"{path} was written with another tokenizer ({written_with[:8]}, expected {fingerprint[:8]}): "
                         f"{remedy}")
    if (offsets.size - 1, values.size) != (shard["rows"], shard["tokens"]):
        raise ValueError(f"{path} is damaged: {remedy}")
    if verify and hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
        raise ValueError(f"{path} is damaged (its sha256 differs from meta.json): {remedy}")
    return offsets, values


@dataclass(frozen=True)
class Cursor:
    """An endless, shuffled pass over a split; every batch is a pure function of (seed, step).

    The sequence of rows does not depend on who reads them: the batches of two ranks, each taking its `rows`, are
    together the batch of one. Within an epoch windows (or documents) do not repeat.

    Attributes:
        batch_size: rows per step, over all ranks.
        block_size: T, tokens per row.
        seed: the run's seed.
    """

    dataset: Dataset
    split: str
    batch_size: int
    block_size: int
    seed: int
    _orders: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.num_windows:
            raise ValueError(_too_short(self.dataset, self.split, 1, 0, self.block_size))

    @cached_property
    def num_windows(self) -> int:
        """Windows (documents) of an epoch."""
        return int(self._row_windows.sum())

    @cached_property
    def _row_windows(self) -> np.ndarray:
        """[R] windows per row: one fewer than fit, when that leaves room for every phase."""
        length = self.dataset.splits[self.split].length
        if _is_documents(self.dataset):
            return np.ones_like(length)
        return np.maximum((length + 1) // self.block_size - 1, length >= self.block_size)

    def batch(self, step: int, *, rows: slice | range | None = None) -> Batch:
        """The batch of an optimizer step, or a rank's rows of it.

        Args:
            step: counts from 0.
            rows: which of the `batch_size` rows; None for all.

        Returns:
            [B, T] tokens and attention mask, on the CPU.
        """
        drawn = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[slice(None) if rows is None else rows]
        epochs, places = np.divmod(drawn, self.num_windows)
        chosen = [(row[places[epochs == epoch]], start[places[epochs == epoch]])
                  for epoch in np.unique(epochs).tolist() for row, start in [self._order(epoch)]]
        return _gather(self.dataset, self.split, *map(np.concatenate, zip(*chosen, strict=True)), self.block_size)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and start of each of the epoch's windows, in the order in which they are read."""
        if epoch not in self._orders:
            while len(self._orders) > 1:  # two epochs may share a batch; a third is far away
                del self._orders[min(self._orders)]
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed % 2**64, epoch])))
            split = self.dataset.splits[self.split]
            slack = 0 if _is_documents(self.dataset) else split.length - self._row_windows * self.block_size
            phase = rng.integers(0, slack + 1, size=split.length.shape)
            row, start = _tile(self._row_windows, phase, self.block_size)
            order = rng.permutation(row.size)
            self._orders[epoch] = row[order], start[order]
        return self._orders[epoch]


def windows(dataset: Dataset, split: str, num: int, block_size: int, seed: int, *, key: str = "") -> Batch:
    """Fixed windows of a split that do not overlap (documents: rows); a larger `num` extends a smaller one.

    Args:
        num: B, how many.
        block_size: T, tokens each.
        seed: chooses which; equal seeds give equal windows.
        key: the config's, that asks for so many.

    Returns:
        [B, T] tokens and attention mask.

    Raises:
        ValueError: the split holds fewer.
    """
    row, start, _ = _chosen(dataset, split, num, block_size, seed, key)
    return _gather(dataset, split, row, start, block_size)


def window_places(dataset: Dataset, split: str, num: int, block_size: int, seed: int) -> Tensor:
    """[B] int64: where in the split each of these `windows` stands, counted in windows (documents)."""
    return torch.from_numpy(_chosen(dataset, split, num, block_size, seed)[2])


def _chosen(
    dataset: Dataset, split: str, num: int, block_size: int, seed: int, key: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, start within it, and place in the split, of each of `windows`."""
    length = dataset.splits[split].length
    count = np.ones_like(length) if _is_documents(dataset) else length // block_size
    if count.sum() < num:
        raise ValueError(_too_short(dataset, split, num, int(count.sum()), block_size, key))
    row, start = _tile(count, np.zeros_like(length), block_size)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64])))
    chosen = rng.permutation(row.size)[:num]
    return row[chosen], start[chosen], chosen


def _tile(count: np.ndarray, phase: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row, and start within it, of `count[r]` consecutive windows that begin at `phase[r]`."""
    row = np.repeat(np.arange(count.size), count)
    number = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
    return row, phase[row] + number * block_size


def _gather(dataset: Dataset, split: str, row: np.ndarray, start: np.ndarray, block_size: int) -> Batch:
    """Copy windows out of the mapped shards; one copy widens them to int64."""
    source = dataset.splits[split]
    begin, shard = source.start[row] + start, source.shard[row]
    tokens = torch.empty(len(row), block_size, dtype=torch.int64)
    out = tokens.numpy()
    for index in np.unique(shard).tolist():
        values, here = source.values[index], shard == index
        if _is_documents(dataset):
            out[here] = values[np.minimum(begin[here, None] + np.arange(block_size), values.size - 1)]
        else:  # a view of every window that the shard has; indexing it copies whole rows
            out[here] = np.lib.stride_tricks.sliding_window_view(values, block_size)[begin[here]]
    if not _is_documents(dataset):
        return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    attention_mask = torch.arange(block_size) < torch.from_numpy(source.length[row])[:, None]
    return Batch(tokens.masked_fill_(~attention_mask, dataset.vocabulary.pad_id), attention_mask)


def _is_documents(dataset: Dataset) -> bool:
    return dataset.meta["section"]["layout"] == "documents"


def _too_short(dataset: Dataset, split: str, wanted: int, found: int, block_size: int, key: str = "") -> str:
    unit = "documents" if _is_documents(dataset) else f"windows of {block_size} tokens"
    share = "share for the other splits" if split == "train" else f"data.{split}_fraction"
    smaller = [] if _is_documents(dataset) else ["data.block_size"]
    fewer = " or ".join(["", *(f"a smaller {name}" for name in [*smaller, key] if name)])
    return (f"{dataset.folder}: the {split} split holds {found} {unit}, {wanted} needed: use more text, another "
            f"{share}{fewer}")


def make_dataset(documents: Iterable[str], section: DataSection, folder: str | Path) -> Dataset:
    """Tokenize documents in this process and write them as a dataset; pipelines/prepare.py does so on Ray.

    Raises:
        ValueError: too little text for a block in every split.
    """
    documents = list(documents)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    tokenizer = build_tokenizer(section.tokenizer, documents)
    with partial_folder(Path(folder)) as partial:
        shards = write_piece(documents, section, tokenizer, partial, 0)
        finish_dataset(partial, section, tokenizer, shards, [{"name": "documents", "sha256": digest.hexdigest()}])
    return open_dataset(folder)
