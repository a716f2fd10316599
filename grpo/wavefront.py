"""Sampling tokens from logits, and the wavefront: fill a row outwards from what is known, neighbours first.

The sampler head sees, beside a [MASK]'s hidden state, the tokens now standing to its left and right. The wavefront
fills in one go all [MASK]s next to a known token, then those next to these, until no [MASK] is left; a row without
any known token first seeds itself with its most confident positions from the lm head.

1. The plan comes first. Which position is filled in which wave follows from distances to known tokens alone, so all
   waves are computed at once and sorted: each wave is a slice, head work is done once per position, and the host
   reads the waves' sizes once per call (twice where a row must seed itself), never per wave.
2. Two adjacent positions are never filled in one wave, blind to each other: in a gap of even width the right one of
   the two middle positions waits one wave. Seeds are local maxima of the confidence, hence never adjacent.
3. A run of text between pads is a row of its own: if it holds no known token it seeds itself in the first wave.
4. Seeds come from the lm head, everything else from the sampler head. Confidences are rounded to 2^-10 nats and ties
   broken by the row's noise: a fully masked row gives the same state, up to rounding, at every position.
5. Tokens are drawn by the inverse of a float64 distribution function over the base vocabulary (special ids and the
   padding of the vocabulary are cut off before the softmax) with noise that is a function of (row seed, step,
   purpose, position) and not of the wave, so that a position-by-position loop draws the same text.
6. The auxiliary loss reaches the sampler head alone: hidden states, neighbour embeddings and the lm head's matrix are
   detached. Its neighbours are the clean tokens, each side hidden at random, as inference meets both, one or none.
   It computes heads at [MASK]s alone, whose number is one host read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from grpo.model import GPT, text_logits
from grpo.noise import HIDE_LEFT, HIDE_RIGHT, PROPOSE, SEED, uniforms
from grpo.sliced_loss import sliced_loss
from grpo.slices import slices
from grpo.tokenizer import Vocabulary

_FAR = 1 << 40  # distance to a known token that does not exist
_BELOW_ONE = 1 - 2.0**-52  # times a total near 1 it rounds to less than the total: a token with probability is hit
_LOGITS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 26}  # of [M, V] tables, float64: 1 MB, in the cache; 0.5 GB
_LEAST_ROWS = 64  # of such a table: each reads the lm head once, which for a large vocabulary is what costs


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn at M positions."""

    tokens: Tensor
    """[M] int64."""
    logprobs: Tensor
    """[M] log-probability of each under temperature and nucleus, nats."""
    confidences: Tensor
    """[M] the same under neither."""
    support: Tensor | None
    """[M, base_size] bool, the nucleus; None where it is everything."""
    entropies: Tensor | None = None
    """[M] of the distributions drawn from, nats; None unless recorded."""

    def reorder(self, order: Tensor) -> Sampled:
        """The same draws in another order, [M] int64."""
        pick = lambda x: None if x is None else x[order]  # noqa: E731
        return Sampled(*map(pick, (self.tokens, self.logprobs, self.confidences, self.support, self.entropies)))


@dataclass(frozen=True)
class WavefrontResult:
    """A filled batch; M positions were filled, in row-major order."""

    tokens: Tensor
    """[B, T] int64 without [MASK]."""
    sampled: Sampled
    """What was drawn at the M positions; support and entropies only if recorded."""
    neighbors: Tensor
    """[M, 2] int64, the left and right token that each proposal saw, -1 for none."""
    by_lm: Tensor
    """[M] bool, seeds, drawn from the lm head."""
    waves: Tensor
    """[B] int64, waves that each row took."""


def nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens whose mass reaches top_p (arXiv:1904.09751); never empty.

    Args:
        logprobs: [..., V] normalised.

    Returns:
        [..., V] bool.
    """
    ordered, order = logprobs.double().exp().sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, mass_before < top_p)


def proposal_logprobs(logits: Tensor, temperature: float, support: Tensor | None = None) -> Tensor:
    """Log-probabilities that tokens are drawn with: temperature, then the nucleus, renormalised.

    Args:
        logits: [..., base_size], text columns only.
        support: bool of the same shape, or None for everything.

    Returns:
        [..., base_size], at least float32; -inf outside the support.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    if support is not None:
        logits = logits.masked_fill(~support, float("-inf"))
    return logits.log_softmax(-1)


def sample_tokens(
    logits: Tensor, noise: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, record: bool = False
) -> Sampled:
    """Draw one token per row of logits by the inverse distribution function, in float64.

    Args:
        logits: [M, base_size], text columns only.
        noise: [M] float64 uniforms in (0, 1).
        record: compute entropies too.
    """
    logprobs = proposal_logprobs(logits, temperature)
    support = None
    if top_p < 1:
        support = nucleus(logprobs, top_p)
        logprobs = proposal_logprobs(logits, temperature, support)
    wide = logprobs.double()
    probabilities = wide.exp()
    cumulative = probabilities.cumsum(-1)
    target = noise.clamp(max=_BELOW_ONE)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    tokens = tokens.clamp(max=logprobs.shape[-1] - 1)  # NaN logits are reported as such, not as a bad index
    chosen = logprobs.gather(-1, tokens)[:, 0]
    plain = chosen if temperature == 1 and top_p == 1 else proposal_logprobs(logits, 1.0).gather(-1, tokens)[:, 0]
    entropies = None
    if record:
        finite = wide if support is None else wide.masked_fill_(~support, 0.0)
        entropies = -torch.linalg.vecdot(probabilities, finite).to(chosen.dtype)
    return Sampled(tokens[:, 0], chosen, plain, support, entropies)


def state_slices(vocabulary: Vocabulary, states: Tensor) -> Iterator[slice]:
    """Slices of M states, or places of states, [M, ..], whose tables over the vocabulary suit the device."""
    at_once = max(_LOGITS_AT_ONCE[states.device.type], _LEAST_ROWS * vocabulary.size)
    return slices(len(states), vocabulary.size, at_once)


def sampler_states(model: GPT, hidden: Tensor, neighbors: Tensor) -> Tensor:
    """Hidden states conditioned on the neighbours' embeddings; a missing neighbour is a zero vector.

    Args:
        hidden: [..., C]. neighbors: [..., 2] int64, left and right token; -1, [MASK] and pad are missing.

    Returns:
        [..., C].
    """
    left, right = model.embed_known(neighbors).unbind(-2)
    return model.heads["sampler"](hidden, left, right)


def proposal_logits(
    model: GPT, hidden: Tensor, neighbors: Tensor | None = None, by_lm: Tensor | None = None
) -> Tensor:
    """Logits that proposals are drawn from: the lm head, or the sampler head before it.

    Args:
        hidden: [M, C] trunk states.
        neighbors: [M, 2] int64, or None without a sampler.
        by_lm: [M] bool, where the sampler is not used after all; None for nowhere.

    Returns:
        [M, base_size].
    """
    if neighbors is not None:
        states = sampler_states(model, hidden, neighbors)
        hidden = states if by_lm is None else torch.where(by_lm[:, None], hidden, states)
    return text_logits(model.heads["lm"](hidden), model.vocabulary)


def propose(
    model: GPT,
    hidden: Tensor,
    noise: Tensor,
    neighbors: Tensor | None = None,
    by_lm: Tensor | None = None,
    *,
    temperature: float,
    top_p: float,
    record: bool,
) -> Sampled:
    """Draw a token at each of M positions from `proposal_logits`, in bounded memory; all of `Sampled` if recorded."""
    parts = []
    for part in state_slices(model.vocabulary, hidden):
        logits = proposal_logits(
            model,
            hidden[part],
            None if neighbors is None else neighbors[part],
            None if by_lm is None else by_lm[part],
        )
        parts.append(sample_tokens(logits, noise[part], temperature=temperature, top_p=top_p, record=record))
    return _concatenate(parts, record)


def _concatenate(parts: list[Sampled], record: bool) -> Sampled:
    if len(parts) == 1:
        return parts[0] if record else replace(parts[0], support=None)
    support = torch.cat([part.support for part in parts]) if record and parts[0].support is not None else None
    columns = [torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "logprobs", "confidences")]
    return Sampled(*columns, support, torch.cat([part.entropies for part in parts]) if record else None)


def _distances(known: Tensor, wall: Tensor) -> tuple[Tensor, Tensor]:
    """Steps to the nearest known token on the left and on the right, `_FAR` if a pad or the edge comes first. [B, T]"""

    def from_left(known: Tensor, wall: Tensor) -> Tensor:
        column = torch.arange(known.shape[1], device=known.device).expand_as(known)
        last_known = torch.where(known, column, -1).cummax(1).values
        last_wall = torch.where(wall, column, -1).cummax(1).values
        return torch.where(last_known > last_wall, column - last_known, _FAR)

    return from_left(known, wall), from_left(known.flip(1), wall.flip(1)).flip(1)


def _waves(known: Tensor, wall: Tensor) -> Tensor:
    """The wave in which each position is filled, 0 where known, `_FAR` where nothing known is in reach. [B, T]"""
    left, right = _distances(known, wall)
    return torch.where(left <= right + 1, left, right)  # + 1: of two middle positions the right one waits


def _seeds(confidence: Tensor, unreached: Tensor, wall: Tensor, ratio: float) -> Tensor:
    """Positions that start a row: its best local maxima of confidence, and the best of each run between pads.

    Args:
        confidence: [B, T] float64 without ties. unreached: [B, T] bool, candidates. wall: [B, T] bool, pads.

    Returns:
        [B, T] bool, no two adjacent.
    """
    score = torch.where(unreached, confidence, float("-inf"))
    edged = F.pad(score, (1, 1), value=float("-inf"))
    peak = unreached & (score > edged[:, :-2]) & (score > edged[:, 2:])
    wanted = (unreached.sum(1) * ratio).long().clamp(min=1)
    rank = torch.where(peak, score, float("-inf")).argsort(1, descending=True).argsort(1)
    run = wall.long().cumsum(1)
    best = torch.full((len(score), score.shape[1] + 1), float("-inf"), dtype=score.dtype, device=score.device)
    best = best.scatter_reduce(1, run, score, "amax").gather(1, run)
    return peak & ((rank < wanted[:, None]) | (score == best))


def _confidences(model: GPT, hidden: Tensor) -> Tensor:
    """[M] float64: the lm head's largest text log-probability, rounded to 2^-10 nats."""
    parts = []
    for part in state_slices(model.vocabulary, hidden):
        parts.append(proposal_logprobs(proposal_logits(model, hidden[part]), 1.0).amax(-1))
    return (torch.cat(parts).double() * 1024).round()


@torch.no_grad()
def wavefront_fill(
    model: GPT,
    hidden: Tensor,
    tokens: Tensor,
    *,
    seeds: Tensor,
    step: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_neighbors_ratio: float = 0.01,
    attention_mask: Tensor | None = None,
    record: bool = False,
) -> WavefrontResult:
    """Fill every [MASK] outwards from the known tokens by the sampler head.

    Args:
        hidden: [B, T, C] trunk states of `tokens`.
        tokens: [B, T] int64.
        seeds: [B] int64, one per row.
        step: denoising step, a counter of the noise.
        min_neighbors_ratio: share of a row without any known token, at least one position, that seeds it.
        attention_mask: [B, T] bool, False at pads, which are neither filled nor neighbours.
        record: keep the nucleus and the entropy of each draw.
    """
    vocabulary = model.vocabulary
    rows, columns = tokens.shape
    visible = tokens if attention_mask is None else torch.where(attention_mask, tokens, vocabulary.pad_id)
    known, masked = visible < vocabulary.base_size, visible == vocabulary.mask_id
    wall = ~known & ~masked
    states = hidden.flatten(0, 1)

    wave = _waves(known, wall)
    unreached = masked & (wave >= _FAR)
    seeded = torch.zeros_like(masked)
    sizes = _wave_sizes(wave, masked)
    num_unreached = sizes[-1]
    if num_unreached:
        places = torch.nonzero_static(unreached.flatten(), size=num_unreached)[:, 0]
        column = torch.arange(columns, device=tokens.device)
        confidence = uniforms(seeds[:, None], step, SEED, column)  # breaks ties
        confidence.view(-1)[places] += _confidences(model, states[places])
        seeded = _seeds(confidence, unreached, wall, min_neighbors_ratio)
        later = _waves(known | seeded, wall) + 1
        wave = torch.where(unreached, later, wave)
        sizes = _wave_sizes(wave, masked)
    sizes = [size for size in sizes if size]

    places = torch.nonzero_static(masked.flatten(), size=sum(sizes))[:, 0]  # row-major
    order = wave.flatten()[places].sort(stable=True).indices
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    places = places[order]
    row, column = places // columns, places % columns
    noise = uniforms(seeds[row], step, PROPOSE, column)
    states, by_lm = states[places], seeded.flatten()[places]
    board = F.pad(torch.where(known, visible, -1), (1, 1), value=-1).flatten()  # the text as a neighbour is seen
    places = row * (columns + 2) + column + 1
    around = places[:, None] + torch.tensor([-1, 1], device=places.device)

    neighbors, parts = [], []
    waves = zip(*(each.split(sizes or [0]) for each in (states, noise, places, around, by_lm)), strict=True)
    for index, (wave_states, wave_noise, wave_places, beside, seeds_here) in enumerate(waves):
        neighbors.append(board[beside])
        parts.append(
            propose(
                model, wave_states, wave_noise, neighbors[-1], seeds_here if num_unreached and not index else None,
                temperature=temperature, top_p=top_p, record=record,
            )
        )
        board[wave_places] = parts[-1].tokens
    filled = board.view(rows, columns + 2)[:, 1:-1]
    return WavefrontResult(
        tokens=torch.where(masked, filled, tokens),
        sampled=_concatenate(parts, record).reorder(inverse),
        neighbors=torch.cat(neighbors)[inverse],
        by_lm=by_lm[inverse],
        waves=torch.where(masked, wave, 0).amax(1),
    )


def _wave_sizes(wave: Tensor, masked: Tensor) -> list[int]:
    """Positions filled in each wave, then how many no wave reaches: the one host read of a plan."""
    last = wave.shape[1] + 1
    index = torch.where(masked, wave.clamp(max=last + 1), 0).flatten()
    sizes = torch.zeros(last + 2, dtype=torch.int64, device=wave.device)
    sizes.scatter_add_(0, index, masked.flatten().long())
    return [int(size) for size in sizes.cpu()[1:]]


def sampler_loss(
    model: GPT,
    hidden: Tensor,
    clean: Tensor,
    masked: Tensor,
    *,
    seeds: Tensor,
    side_dropout: float,
    denominator: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the sampler head at masked positions; no parameter but its own gets a gradient.

    Args:
        hidden: [B, T, C] trunk states of the corrupted input.
        clean: [B, T] int64, the text, pads as their id.
        masked: [B, T] bool, [MASK] in the corrupted input.
        seeds: [B] int64, of this training step.
        side_dropout: probability with which each neighbour is hidden.
        denominator: masked positions over all micro-batches and ranks.

    Returns:
        (loss, metrics): the pair `loss_sampler` (see `grpo/metrics.py`), nats per masked position.
    """
    vocabulary = model.vocabulary
    row, column = masked.nonzero(as_tuple=True)
    edged = F.pad(clean, (1, 1), value=vocabulary.pad_id)
    sides = torch.stack([edged[row, column], edged[row, column + 2]], dim=-1)
    noise = torch.stack([uniforms(seeds[row], side, column) for side in (HIDE_LEFT, HIDE_RIGHT)], dim=-1)
    left, right = model.embed_known(torch.where(noise < side_dropout, -1, sides)).detach().unbind(-2)
    states = model.heads["sampler"](hidden.detach()[row, column], left, right)
    lm = model.heads["lm"]
    constants = {name: value.detach() for name, value in (*lm.named_parameters(), ("matrix", lm.weight))}
    targets = clean[row, column]

    def cross_entropy(part: slice, logits: Tensor) -> Tensor:
        logits = text_logits(logits, vocabulary)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets[part], reduction="sum")

    total = sliced_loss(
        lambda part: functional_call(lm, constants, (part,)), states, cross_entropy, vocabulary=len(lm.weight)
    )
    return total / denominator, {"loss_sampler": torch.stack([total.detach(), masked.sum()]).double()}
