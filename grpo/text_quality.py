"""Measures of generated text beside natural text: likelihood, diversity, overlap, and a classifier two-sample test.

All of them read completions only; a prompt, which generated and natural text share, is cut off by `quality_report`.
B is samples, T tokens. `mask` [B, T] is True at real tokens (None: all are). Natural and generated text come in pairs
of one shape under one mask, so nothing can tell them apart by length, alignment or padding.

1. N-grams are compared by exact integer ids, built order by order with `torch.unique`, never by a lossy hash.
2. `self_bleu` (Zhu et al., Texygen, arXiv:1802.01886) has no brevity penalty, because lengths are given to the
   samples, not chosen by them, and counts an order without any match as half a match rather than NLTK's 0.1.
3. `c2st` (Lopez-Paz and Oquab, arXiv:1610.06545) is cross-fitted: each half of the pairs is judged by a classifier
   trained on the other half, which uses every sample for the estimate and so halves its variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
