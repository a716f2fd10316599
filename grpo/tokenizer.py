"""Text to token ids and back: bytes, byte-level BPE (Sennrich et al., arXiv:1508.07909), or any tiktoken ranks.

A token is a byte string and its id is its rank; `tiktoken` merges greedily by rank. [MASK] and padding lie above the
base vocabulary, and the model's vocabulary is rounded up to a multiple of 64.

1. Text never produces a special id: "<|endoftext|>" in a corpus is thirteen characters, also for named encodings,
   whose own special tokens are left out of the base vocabulary.
2. BPE is trained by `tokenizers` on at most `TRAINING_BYTES` of UTF-8, taken document by document. Only the merged
   byte strings, in the order of their merges, are kept; tiktoken's merging of them defines the encoding.
3. A rank file alone carries no splitting pattern; GPT-2's is used for it, as for trained BPE. A folder of
   `Tokenizer.save` holds its own.
4. Every string of Unicode scalar values round-trips. Lone surrogates, which UTF-8 cannot hold, become U+FFFD.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

TRAINING_BYTES = 16 * 2**20
MOST_PAIRS = 1 << 20
DOWNLOAD_S = 30.0
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
RANKS_FILE, DESCRIPTION_FILE = "tokenizer.tiktoken", "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """Ids below `base_size` are text; [MASK], padding and the filling up to a multiple of 64 never are."""

    base_size: int

    @property
    def mask_id(self) -> int:
        return self.base_size

    @property
    def pad_id(self) -> int:
        return self.base_size + 1

    @property
    def size(self) -> int:
        return (self.base_size + 2 + 63) // 64 * 64


class Tokenizer:
    """A tiktoken encoding with [MASK] and padding ids above it. Pickles, so it travels to workers."""

    def __init__(self, kind: str, ranks: dict[bytes, int], pattern: str) -> None:
        self.kind, self.pattern = kind, pattern
        self.vocabulary = Vocabulary(len(ranks))
        self._bytes = sorted(ranks, key=ranks.__getitem__)
        ranks = {token: rank for rank, token in enumerate(self._bytes)}  # p50k_base leaves out an id
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        digest = hashlib.sha256(json.dumps([kind, pattern]).encode())
        digest.update(_rank_lines(self._bytes))
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of a text, [T] unsigned integers."""
        if self._plain_bytes:
            return np.frombuffer(_scalar_values(text).encode(), dtype=np.uint8)
        return self._encoding.encode_to_numpy(_scalar_values(text), disallowed_special=())

    def decode(self, ids: Iterable[int], mask_text: str = "\u2588") -> str:
        """Text of token ids (a list, an array or a tensor).

        Args:
            ids: [T] ids; padding is dropped.
            mask_text: stands for [MASK].

        Returns:
            The text; bytes that are not UTF-8, such as half a character beside a [MASK], become U+FFFD.
        """
        special = {self.vocabulary.mask_id: mask_text.encode(), self.vocabulary.pad_id: b""}
        pieces = [special[i] if i in special else self._bytes[i] for i in np.asarray(ids).tolist()]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a text id stands for; they need not be whole characters."""
        return self._bytes[token]

    def save(self, folder: str | Path) -> None:
        """Write the ranks and their description into `folder`, which may hold other files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RANKS_FILE).write_bytes(_rank_lines(self._bytes))
        description = {"kind": self.kind, "pattern": self.pattern, "fingerprint": self.fingerprint}
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing or damaged.
        """
        path = Path(folder) / DESCRIPTION_FILE
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            kind, pattern, fingerprint = (description[key] for key in ("kind", "pattern", "fingerprint"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is missing, damaged or no tokenizer of this project: prepare the data, copy the "
                             "checkpoint or save the tokenizer again") from error
        tokenizer = Tokenizer(kind, read_ranks(Path(folder) / RANKS_FILE), pattern)
        if tokenizer.fingerprint != fingerprint:
            raise ValueError(f"{Path(folder) / RANKS_FILE} does not match {path.name}: prepare the data, copy the "
                             "checkpoint or save the tokenizer again")
        return tokenizer

    @property
    def _plain_bytes(self) -> bool:
        return self.kind == "bytes"

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "pattern": self.pattern, "tokens": self._bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["kind"], {token: rank for rank, token in enumerate(state["tokens"])}, state["pattern"])


def build_tokenizer(kind: str, documents: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
        kind: `bytes`, `bpe:<size>`, a tiktoken encoding name, the path of a `.tiktoken` rank file, or a folder that
            `Tokenizer.save` wrote.
        documents: training text of `bpe:<size>`; read until `TRAINING_BYTES`.

    Raises:
        ValueError: an unknown kind, a damaged rank file, or an encoding that cannot be fetched.
    """
    if kind == "bytes":
        return Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)}, PATTERN)
    if kind.startswith("bpe:"):
        return Tokenizer(kind, _train_ranks(_bpe_size(kind), documents), PATTERN)
    path = tokenizer_path(kind)
    if path is None:
        return _named_tokenizer(kind)
    return Tokenizer.load(path) if path.is_dir() else Tokenizer("rank-file", read_ranks(path), PATTERN)


def tokenizer_path(kind: str) -> Path | None:
    """The rank file or folder that `data.tokenizer` names; None where it is no path."""
    if kind == "bytes" or kind.startswith("bpe:") or kind in tiktoken.list_encoding_names():
        return None
    path = Path(os.path.expanduser(kind))
    return path if kind.endswith(".tiktoken") or path.is_dir() else None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of a `.tiktoken` file: one base64 token and its rank per line.

    Raises:
        ValueError: missing, damaged, ranks other than 0, 1, 2, ..., or a byte without a token.
    """
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise ValueError(f"data.tokenizer: cannot read {path}: give the path of a .tiktoken rank file") from error
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{path} is not a rank file (base64 token and rank on each line): fetch it again") from error
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise ValueError(f"{path} is damaged: its ranks are not 0 to {len(pairs) - 1}, each once: fetch it again")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path} lacks some of the 256 single bytes, so it cannot encode every text: use another file")
    return ranks


def _rank_lines(tokens: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _scalar_values(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # surrogate pairs become the character that they mean, lone ones U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _bpe_size(kind: str) -> int:
    size = kind.removeprefix("bpe:")
    if not size.isdecimal() or not 256 <= int(size) <= MOST_PAIRS:
        raise ValueError(f"data.tokenizer must be bpe:<size> with a size from 256 (the bytes) to {MOST_PAIRS}, got "
                         f"{kind!r}")
    return int(size)


def _train_ranks(size: int, documents: Iterable[str] | None) -> dict[bytes, int]:
    if documents is None:
        raise ValueError(f"data.tokenizer=bpe:{size} is trained on the source: prepare it with pipelines/prepare.py")
    from tokenizers import Tokenizer as Trainable  # not needed to read or write text
    from tokenizers import models, pre_tokenizers, trainers

    model = Trainable(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(_capped(documents), trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    merged = sorted((rank, token) for token, rank in model.get_vocab().items() if token not in alphabet)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [_alphabet_bytes(token) for _, token in merged]
    return {token: rank for rank, token in enumerate(tokens)}


def _capped(documents: Iterable[str]) -> Iterator[str]:
    left = TRAINING_BYTES
    for document in documents:
        data = _scalar_values(document).encode()
        yield data[:left].decode("utf-8", errors="ignore")
        left -= len(data)
        if left <= 0:
            return


def _alphabet_bytes(token: str) -> bytes:
    """The bytes that a token of the `tokenizers` library writes in GPT-2's printable alphabet."""
    return bytes(_BYTE_OF[character] for character in token)


def _printable_alphabet() -> dict[str, int]:
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _printable_alphabet()


def _named_tokenizer(name: str) -> Tokenizer:
    """A tiktoken encoding by name; the fetch runs beside a clock, because tiktoken's own has no time limit."""
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"data.tokenizer must be bytes, bpe:<size>, a .tiktoken file, a saved tokenizer's folder or "
                         f"one of {', '.join(tiktoken.list_encoding_names())}, got {name!r}")
    fetched: list[tiktoken.Encoding] = []

    def fetch() -> None:
        try:
            fetched.append(tiktoken.get_encoding(name))
        except Exception:  # whatever the network raised, the remedy below is the same
            return

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_S)
    if not fetched:
        raise ValueError(f"data.tokenizer={name} cannot be fetched: connect to the network once, or set "
                         "TIKTOKEN_CACHE_DIR to a filled tiktoken cache, or use data.tokenizer=bytes or bpe:<size>")
    encoding = fetched[0]
    return Tokenizer(name, encoding._mergeable_ranks, encoding._pat_str)
