"""Measures of generated text beside natural text: likelihood, diversity, overlap, and a classifier two-sample test.

All of them read completions only; a prompt, which generated and natural text share, is cut off by `quality_report`.
B is samples, T tokens. `mask` [B, T] is True at real tokens (None: all are). Natural and generated text come in pairs
of one shape under one mask, so nothing can tell them apart by length, alignment or padding.

1. N-grams are compared by exact integer ids, built order by order with `torch.unique`, never by a lossy hash.
2. `self_bleu` (Zhu et al., Texygen, arXiv:1802.01886) has no brevity penalty, because lengths are given to the
   samples, not chosen by them, and counts an order without any match as half a match rather than NLTK's 0.1.
3. `c2st` (Lopez-Paz and Oquab, arXiv:1610.06545) is cross-fitted: each half of the texts is judged by a classifier
   trained on the other half, which uses every sample for the estimate and so halves its variance. Windows of one
   document share its words, which would tell natural text from other natural text; so the halves are those of the
   corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.sliced_loss import LOGITS_AT_ONCE
from grpo.slices import slices


def _ngrams(tokens: Tensor, n: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids and rows of all n-grams that hold real tokens only.

    Equal n-grams have equal ids and only they do; ids are dense from 0. An id of order n is made from the dense id of
    its first n - 1 tokens and its last token, so that codes stay below (B x T) x (largest token + 1).

    Args:
        tokens: [B, T] int64.

    Returns:
        ids [M] and rows [M], int64.
    """
    B, T = tokens.shape
    if T < n:
        raise ValueError(f"{n}-grams need texts of at least {n} tokens, got {T}")
    base = tokens.max() + 1
    ids_BT = tokens
    for order in range(2, n + 1):
        codes = ids_BT[:, :-1] * base + tokens[:, order - 1:]
        ids_BT = codes.unique(return_inverse=True)[1]
    rows_BT = torch.arange(B, device=tokens.device)[:, None].expand_as(ids_BT)
    if mask is None:
        kept = torch.ones_like(ids_BT, dtype=torch.bool)
    else:
        kept = mask.unfold(1, n, 1).all(-1)
    ids = ids_BT[kept].unique(return_inverse=True)[1]
    return ids, rows_BT[kept]


def _counts_by_row(ids: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (id, row) pairs and how often each occurs: ids [P], rows [P], counts [P] float64, sorted by id."""
    pairs, counts = (ids * num_rows + rows).unique(return_counts=True)
    return pairs // num_rows, pairs % num_rows, counts.double()


def token_entropy(tokens: Tensor, mask: Tensor | None = None) -> float:
    """Mean over samples of the entropy, in nats, of the sample's own token counts.

    Args:
        tokens: [B, T] int64. mask: [B, T] bool or None.
    """
    ids, rows = _ngrams(tokens, 1, mask)
    _, rows, counts = _counts_by_row(ids, rows, len(tokens))
    length = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device).index_add_(0, rows, counts)
    p = counts / length[rows]
    return (-(p * p.log()).sum() / (length > 0).sum()).item()


def distinct_n(tokens: Tensor, n: int = 4, mask: Tensor | None = None) -> float:
    """Number of different n-grams in all samples together, divided by the number of all their n-grams.

    It falls with the number of samples: compare sets of one size. An n-gram never spans two samples.
    """
    ids, _ = _ngrams(tokens, n, mask)
    return (ids.max() + 1).item() / len(ids)


def self_bleu(tokens: Tensor, n: int = 4, mask: Tensor | None = None) -> float:
    """Mean over samples of BLEU-n against all other samples as references: 1 where every sample is a copy.

    The modified precision of order k clips each k-gram's count in a sample to its largest count in any *other* sample;
    BLEU is the geometric mean of orders 1 to n. Samples shorter than n tokens are left out.

    Args:
        tokens: [B, T] int64, B >= 2. mask: [B, T] bool or None.
    """
    B = len(tokens)
    if B < 2:
        raise ValueError(f"self-BLEU compares samples with one another: it needs at least 2, got {B}")
    zeros = torch.zeros(B, dtype=torch.float64, device=tokens.device)
    log_bleu, total = zeros.clone(), zeros
    for order in range(1, n + 1):
        ids, rows, counts = _counts_by_row(*_ngrams(tokens, order, mask), B)
        of_id = torch.zeros(int(ids[-1]) + 1, dtype=torch.float64, device=tokens.device)
        largest = of_id.scatter_reduce(0, ids, counts, "amax")
        at_largest = counts == largest[ids]
        second = of_id.scatter_reduce(0, ids, counts.where(~at_largest, 0), "amax")
        shared = of_id.index_add(0, ids, at_largest.double()) > 1
        elsewhere = torch.where(at_largest & ~shared[ids], second[ids], largest[ids])
        total = zeros.index_add(0, rows, counts)
        matched = zeros.index_add(0, rows, torch.minimum(counts, elsewhere))
        log_bleu += (matched.clamp(min=0.5) / total).log() / n
    return log_bleu.exp()[total > 0].mean().item()


def ngram_js(tokens: Tensor, reference: Tensor, n: int = 3, mask: Tensor | None = None,
             reference_mask: Tensor | None = None) -> float:
    """Jensen-Shannon distance between the n-gram frequencies of samples and of held-out text.

    The distance is the square root of the divergence in bits: 0 for equal frequencies, 1 for disjoint n-grams. It is
    biased upwards for few samples: read it beside the figure of natural text of the same size.

    Args:
        tokens: [B, T] int64. reference: [B', T'] int64. mask, reference_mask: bool of the same shapes, or None.
    """
    B, T = tokens.shape
    width = max(T, reference.shape[1])
    both = torch.cat([F.pad(tokens, (0, width - T)), F.pad(reference, (0, width - reference.shape[1]))])
    real = torch.cat([F.pad(torch.ones_like(t, dtype=torch.bool) if m is None else m, (0, width - t.shape[1]))
                      for t, m in ((tokens, mask), (reference, reference_mask))])
    ids, rows = _ngrams(both, n, real)
    size = int(ids.max()) + 1
    p = torch.bincount(ids[rows < B], minlength=size).double()
    q = torch.bincount(ids[rows >= B], minlength=size).double()
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    bits = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum() / (2 * torch.log(torch.tensor(2.0).double()))
    return bits.clamp(min=0).sqrt().item()


# Weight of each order's kernel, and the ridge, of the C2ST's classifier. On 512 + 512 windows of 48 bytes of a weak
# diffusion model (4, 9 and 24 steps, temperatures 0.8 and 1.0) it was right more often than plain root counts of orders
# 1 to 4 under one weight (0.91 against 0.85 on average) and than a convolutional net with widths 2 to 5 (0.93 against
# 0.85 at 4 steps), in a tenth of the net's time. Rare n-grams, which only a good writer repeats, tell most.
_ORDER_WEIGHTS = {1: 0.05, 2: 0.3, 3: 1.0, 4: 1.0, 5: 1.0}
_RIDGE = 0.03
_COLUMNS = 8192


def _ngram_kernel(tokens: Tensor, n: int, mask: Tensor | None) -> Tensor:
    """Inner products [B, B] float64 of texts as vectors of n-gram counts, with mean 1 on the diagonal.

    A count enters as its square root over that of the number of texts which hold the n-gram; n-grams of a single text
    are left out, and every column is centred. Labels play no part, so test texts may be in it. Zeros if none is shared.
    """
    B = len(tokens)
    ids, rows, counts = _counts_by_row(*_ngrams(tokens, n, mask), B)
    holders = torch.bincount(ids)
    shared = holders[ids] > 1
    ids, rows = ids[shared], rows[shared]
    values = (counts[shared] / holders[ids]).sqrt().float()
    columns = ids.unique_consecutive(return_inverse=True)[1]
    kernel = torch.zeros(B, B, dtype=torch.float64, device=tokens.device)
    for start in range(0, int(columns[-1]) + 1 if len(columns) else 0, _COLUMNS):
        here = (columns >= start) & (columns < start + _COLUMNS)
        features = torch.zeros(B, _COLUMNS, device=tokens.device)
        features[rows[here], columns[here] - start] = values[here]
        features -= features.mean(0)
        kernel += features @ features.T
    return kernel / kernel.diagonal().mean().clamp(min=1e-12)


def _logistic_scores(train: Tensor, test: Tensor, labels: Tensor) -> Tensor:
    """Log-odds [M] of test texts under kernel logistic regression, fitted by Newton's method.

    Args:
        train: [N, N] kernel among training texts. test: [M, N] kernel of test with training texts.
        labels: [N] float64, 1 or 0.
    """
    weights, bias = torch.zeros_like(labels), labels.new_zeros(())
    ones = torch.ones_like(labels)
    for _ in range(15):  # quadratic convergence: 6 to 10 steps reach 1e-6
        logits = train @ weights + bias
        p = logits.sigmoid()
        curvature = (p * (1 - p)).clamp(min=1e-5)
        target = logits + (labels - p) / curvature
        solved = torch.linalg.solve(train + torch.diag(_RIDGE / curvature), torch.stack([target, ones], 1))
        bias = solved[:, 0].sum() / solved[:, 1].sum()
        weights = solved[:, 0] - bias * solved[:, 1]
    return test @ weights + bias


def c2st(natural: Tensor, generated: Tensor, *, places: Tensor,
         mask: Tensor | None = None) -> tuple[float, tuple[float, float]]:
    """Accuracy of a fresh classifier at telling generated from natural text; 0.5 is indistinguishable.

    The classifier is logistic regression on n-gram counts, wherever in the text they stand. Texts are split in halves;
    each half is judged by the classifier fitted to the other.

    Args:
        natural, generated: [B, T] int64 completions of one shape, B >= 4. mask: [B, T] bool, shared, or None.
        places: [B] int64, where in the corpus each pair stands, or [2, B] where natural and generated texts have their
            own; the halves are those of the corpus, so that the two sides share next to no document.

    Returns:
        accuracy over all 2B texts, and its 95 % interval, of the choice of judged texts (`clustered_interval`).
    """
    if natural.shape != generated.shape or len(natural) < 4:
        raise ValueError("c2st needs natural and generated texts in at least 4 pairs of one length, got shapes "
                         f"{tuple(natural.shape)} and {tuple(generated.shape)}")
    B = len(natural)
    both = torch.cat([natural, generated])
    both_mask = None if mask is None else torch.cat([mask, mask])
    kernel = sum(weight * _ngram_kernel(both, n, both_mask) for n, weight in _ORDER_WEIGHTS.items()
                 if n <= both.shape[1])
    rank = places.expand(2, -1).argsort().argsort().flatten().to(both.device)
    second = rank >= B // 2
    is_natural = torch.arange(2 * B, device=both.device) < B
    correct = torch.zeros_like(is_natural)
    for judged in (second, ~second):
        train, test = (~judged).nonzero()[:, 0], judged.nonzero()[:, 0]
        scores = _logistic_scores(kernel[train][:, train], kernel[test][:, train], is_natural[train].double())
        correct[test] = (scores > 0) == is_natural[test]
    return correct.double().mean().item(), clustered_interval(correct, rank)


def clustered_interval(correct: Tensor, rank: Tensor) -> tuple[float, float]:
    """95 % interval of an accuracy over texts of which neighbours share their words, and so their fate.

    Student's over the means of 16 groups of neighbours; never narrower than Wilson's (1927), which takes texts for
    independent and is all there is below 16 places. Given the classifier: how another one would have been fitted is not
    in it.

    Args:
        correct: [N] bool. rank: [N] int64, places in the corpus, 0..max.
    """
    groups, quantile, z = 16, 2.131449545559323, 1.959963984540054  # of Student's t with 15 degrees of freedom; normal
    trials, p = len(correct), correct.double().mean().item()
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials**2)) ** 0.5
    low, high, num = center - half, center + half, int(rank.max()) + 1
    if num < groups:
        return low, high
    group = rank * groups // num
    means = torch.bincount(group, correct.double()) / torch.bincount(group)
    half = quantile * means.std().item() / groups**0.5
    return max(0.0, min(low, p - half)), min(1.0, max(high, p + half))


@torch.no_grad()
def judge_nll(model: torch.nn.Module, tokens: Tensor, start: int, mask: Tensor | None = None) -> float:
    """Negative log-likelihood, nats per token, of positions from `start` on under a causal model that sees the prompt.

    Special ids are outside the softmax, as they are outside sampling. Rows are moved to the model's device, as many at
    once as their logits leave room for.

    Args:
        model: causal `GPT`; `model(tokens)` are logits [B, T, V] of the next token.
        tokens: [B, T] int64, prompt and completion. start: first position that counts, at least 1.
    """
    device, total, count = next(model.parameters()).device, 0.0, 0
    for part in slices(len(tokens), tokens.shape[1] * model.vocabulary.size, LOGITS_AT_ONCE[device.type]):
        rows = tokens[part].to(device)
        logits_BTV = model(rows)[:, start - 1: -1, : model.vocabulary.base_size].float()
        real = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask[part].to(device)
        nll = F.cross_entropy(logits_BTV[real[:, start:]], rows[:, start:][real[:, start:]], reduction="none")
        total += nll.double().sum().item()
        count += nll.numel()
    return total / count


def quality_report(natural: Tensor, generated: Tensor, *, start: int, held_out: Tensor,
                   judge: Callable[[Tensor], float], places: Tensor, mask: Tensor | None = None,
                   natural_mask: Tensor | None = None, held_out_mask: Tensor | None = None) -> dict[str, object]:
    """Every measure of one set of generated texts; a table's natural row passes natural text as generated, beside other
    natural text.

    Args:
        natural, generated: [B, T] int64, prompts included; only positions from `start` on are measured.
        held_out: [B', T'] int64, text for n-gram frequencies that is in neither.
        judge: nats per completion token of whole rows [B, T] (`judge_nll` of an independent model).
        places: [B] or [2, B] int64, where in the corpus the texts stand (see `c2st`).
        mask: [B, T] bool, of generated, or None; natural_mask: of natural where that is another. They are told apart
            where both are real.
        held_out_mask: [B', T'] bool, or None.

    Returns:
        judge_nll, entropy, distinct_4, self_bleu, c2st, c2st_ci95 ([low, high]) and ngram_js; all fit for JSON.
    """
    texts, real = generated[:, start:], None if mask is None else mask[:, start:]
    both = real if natural_mask is None else natural_mask[:, start:] if real is None else natural_mask[:, start:] & real
    accuracy, interval = c2st(natural[:, start:], texts, places=places, mask=both)
    return {
        "judge_nll": judge(generated),
        "entropy": token_entropy(texts, real),
        "distinct_4": distinct_n(texts, 4, real),
        "self_bleu": self_bleu(texts, 4, real),
        "c2st": accuracy,
        "c2st_ci95": list(interval),
        "ngram_js": ngram_js(texts, held_out, 3, real, held_out_mask),
    }


TEMPERATURES = (0.2, 2.0)
"""Between which a match of token entropies is looked for."""


class MatchedTemperature(NamedTuple):
    temperature: float
    entropy: float
    tokens: Tensor


def temperature_matching_entropy(generate_at: Callable[[float], Tensor], target_entropy: float, *,
                                 mask: Tensor | None = None, tolerance: float = 0.01,
                                 max_calls: int = 12) -> MatchedTemperature:
    """The temperature at which generated text has the token entropy of another model's text.

    Bisection whose first guess is temperature 1 and whose later ones are interpolated, kept off the bracket's ends by a
    tenth of its width. Without a temperature in `TEMPERATURES` that matches, the nearest one tried is returned; compare
    `entropy` with the target.

    Args:
        generate_at: completions [B, T] int64 at a temperature, the same noise at each, so that entropy rises smoothly.
        target_entropy: nats. mask: [B, T] bool, True at real tokens, or None. tolerance: relative.
        max_calls: most calls of `generate_at`.

    Returns:
        temperature, entropy there, and the completions.
    """
    (low, high), at_left, at_right = TEMPERATURES, None, None  # entropies at the bracket's ends, once they were tried
    left, right, guess, best = low, high, 1.0, None
    for _ in range(max_calls):
        tokens = generate_at(guess)
        entropy = token_entropy(tokens, mask)
        if best is None or abs(entropy - target_entropy) < abs(best.entropy - target_entropy):
            best = MatchedTemperature(guess, entropy, tokens)
        out_of_range = guess == (high if entropy < target_entropy else low)
        if abs(entropy - target_entropy) <= tolerance * target_entropy or out_of_range:
            break
        if entropy < target_entropy:
            left, at_left = guess, entropy
        else:
            right, at_right = guess, entropy
        if at_left is not None and at_right is not None:
            share = (target_entropy - at_left) / (at_right - at_left) if at_right > at_left else 0.5
            guess = left + min(max(share, 0.1), 0.9) * (right - left)
        elif right - left > 0.25:
            guess = (left + right) / 2
        else:
            guess = right if at_right is None else left
    return best
