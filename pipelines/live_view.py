"""How a text came to be: the steps of a denoising as frames, drawn in the terminal (a page that
plays them: `denoising_page.py`).

1. Each denoising step gives two frames: its input with [MASK]s, and the filled text, coloured by what became of each
   token: protected (the prompt), newly filled and staying, kept from earlier, or about to be re-masked.
2. The policy's P(wrong) is a heat behind the tokens that it judged; a random policy judges nothing and has none.
3. A character of several byte tokens is shown at its last one; control characters are made visible.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.text import Text
from torch import Tensor

from grpo.denoise import StepRecord
from grpo.tokenizer import Tokenizer

KINDS = {
    "p": ("protected", "cyan"),
    "m": ("masked", "bright_black"),
    "n": ("newly filled", "bold green"),
    "k": ("kept", "default"),
    "r": ("re-masked", "bold red strike"),
}
"""Letter -> its meaning, and its style in the terminal."""
MASK_TEXT = "\u2588"


@dataclass(frozen=True)
class Frame:
    """One text at one moment. title: which step. pieces: each token's text. kinds: a letter of KINDS per token.
    heat: P(wrong) of each token in percent, -1 where nobody judged it."""

    title: str
    pieces: list[str]
    kinds: str
    heat: list[int]


def token_pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> list[str]:
    """Each token's own text; bytes that are no UTF-8, such as half a character beside a [MASK], become U+FFFD."""
    vocabulary, pieces = tokenizer.vocabulary, []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token < vocabulary.base_size:
            pieces.append(_visible(decoder.decode(tokenizer.token_bytes(token))))
        else:
            if pieces:
                pieces[-1] += decoder.decode(b"", final=True)
            decoder.reset()
            pieces.append(MASK_TEXT if token == vocabulary.mask_id else "")
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def _visible(text: str) -> str:
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\u00b7" for c in text)
    return shown.replace("\n", "\u21b5\n").replace("\t", "\u2192   ")


def step_frames(record: StepRecord, first: StepRecord, row: int, steps: int, tokenizer: Tokenizer) -> list[Frame]:
    """The two frames of one step of one row.

    Args:
        record: the step. first: the first step of the same denoising, which tells what was given.
        row: which text of the batch.
        steps: S, for the titles.
    """
    masked, remask, eligible = (x[row].tolist() for x in (record.masked, record.remask, record.eligible))
    given = (~(first.masked | first.eligible))[row].tolist()
    inputs = "".join("p" if g else "m" if m else "k" for g, m in zip(given, masked, strict=True))
    filled = "".join(
        "p" if g else "r" if r else "n" if m else "k" for g, m, r in zip(given, masked, remask, strict=True)
    )
    heat = [-1] * len(masked)
    if record.scores is not None and record.scores[row].any():  # log P(wrong) = 0 everywhere: `random`
        percent = (100 * record.scores[row].exp()).round().int().tolist()
        heat = [value if judged else -1 for value, judged in zip(percent, eligible, strict=True)]
    name = f"step {record.step + 1} of {steps}"
    texts = [token_pieces(x[row].tolist(), tokenizer) for x in (record.inputs, record.proposals)]
    before = Frame(f"{name}, input", texts[0], inputs, [-1] * len(masked))
    return [before, Frame(f"{name}, filled", texts[1], filled, heat)]


def final_frame(tokens: Tensor, first: StepRecord, row: int, tokenizer: Tokenizer) -> Frame:
    """The finished text: what was given, and what was written."""
    given = (~(first.masked | first.eligible))[row].tolist()
    pieces = token_pieces(tokens[row].tolist(), tokenizer)
    return Frame("finished", pieces, "".join("p" if g else "k" for g in given), [-1] * len(given))


def counts(frame: Frame) -> str:
    """How many tokens are of each kind, in words."""
    return ", ".join(f"{frame.kinds.count(k)} {name}" for k, (name, _) in KINDS.items() if k in frame.kinds)


def render(frame: Frame) -> Text:
    """A frame for a rich console."""
    text = Text()
    for piece, kind, heat in zip(frame.pieces, frame.kinds, frame.heat, strict=True):
        style = KINDS[kind][1]
        if heat >= 0:
            style += f" on {_heat_colour(heat)}"
        text.append(piece, style=style)
    return text


def legend() -> Text:
    """What the colours mean."""
    text = Text()
    for name, style in KINDS.values():
        text.append(name, style=style).append("  ")
    for percent in range(0, 101, 20):
        text.append(f" {percent} ", style=f"on {_heat_colour(percent)}")
    return text.append(" % P(wrong)")


def _heat_colour(percent: int) -> str:
    return f"rgb({20 + percent * 3 // 2},{20 + percent // 3},20)"


class Recorder:
    """Collects the records of a denoising and turns them into frames, for `denoise(on_step=...)`."""

    def __init__(self, tokenizer: Tokenizer, steps: int) -> None:
        self.tokenizer, self.steps, self.records = tokenizer, steps, []

    def __call__(self, record: StepRecord) -> list[Frame]:
        """Keep a record; returns the first row's two frames of this step."""
        self.records.append(record)
        return self.frames(record, 0)

    def frames(self, record: StepRecord, row: int) -> list[Frame]:
        return step_frames(record, self.records[0], row, self.steps, self.tokenizer)

    def last_filled(self, row: int) -> list[int]:
        """The step, from 1, in which each token of a row was last filled; 0 where it was given."""
        steps = range(1, len(self.records) + 1)
        filled = [step * record.masked[row] for step, record in zip(steps, self.records, strict=True)]
        return torch.stack(filled).amax(0).tolist()

    def sample(self, row: int, tokens: Tensor) -> list[Frame]:
        """All frames of one row, the finished text last."""
        frames = [frame for record in self.records for frame in self.frames(record, row)]
        return [*frames, final_frame(tokens, self.records[0], row, self.tokenizer)]
