import math
from collections import Counter

import pytest
import torch

from grpo.sliced_loss import LOGITS_AT_ONCE
from grpo.text_quality import (
    c2st,
    clustered_interval,
    distinct_n,
    judge_nll,
    ngram_js,
    quality_report,
    self_bleu,
    temperature_matching_entropy,
    token_entropy,
)

torch.set_num_threads(1)


def rows_of(tokens, mask=None):
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return [row[m].tolist() for row, m in zip(tokens, keep, strict=True)]


def grams(row, n):
    return [tuple(row[i: i + n]) for i in range(len(row) - n + 1)]


@pytest.fixture
def texts():
    tokens = torch.randint(0, 4, (7, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 9, 12, 4, 7, 12, 2])
    return tokens, torch.arange(12) < lengths[:, None]


def test_entropy_of_hand_worked_rows():
    tokens = torch.tensor([[5, 5, 5, 5], [1, 2, 1, 2], [0, 1, 2, 3]])
    assert token_entropy(tokens) == pytest.approx((0 + math.log(2) + math.log(4)) / 3, abs=1e-12)


def test_entropy_ignores_what_the_mask_hides(texts):
    tokens, mask = texts
    expected = 0.0
    for row in rows_of(tokens, mask):
        expected -= sum(c / len(row) * math.log(c / len(row)) for c in Counter(row).values()) / len(tokens)
    assert token_entropy(tokens, mask) == pytest.approx(expected, abs=1e-12)
    assert token_entropy(tokens.masked_fill(~mask, 99), mask) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_distinct_matches_sets_of_tuples(texts, n):
    tokens, mask = texts
    for m in (None, mask):
        every = [g for row in rows_of(tokens, m) for g in grams(row, n)]
        assert distinct_n(tokens, n, m) == pytest.approx(len(set(every)) / len(every), abs=1e-12)


def test_ngrams_of_a_large_vocabulary_do_not_collide():
    tokens = torch.randint(0, 200_000, (50, 40), generator=torch.Generator().manual_seed(1))
    every = [g for row in rows_of(tokens) for g in grams(row, 4)]
    assert distinct_n(tokens, 4) == len(set(every)) / len(every)


def test_self_bleu_matches_a_loop_over_samples(texts):
    tokens, mask = texts
    for m in (None, mask):
        rows, scores = rows_of(tokens, m), []
        for i, row in enumerate(rows):
            if len(row) < 4:
                continue
            log_bleu = 0.0
            for k in range(1, 5):
                own = Counter(grams(row, k))
                others = [Counter(grams(other, k)) for j, other in enumerate(rows) if j != i]
                matched = sum(min(c, max(o[g] for o in others)) for g, c in own.items())
                log_bleu += math.log(max(matched, 0.5) / sum(own.values())) / 4
            scores.append(math.exp(log_bleu))
        assert self_bleu(tokens, 4, m) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_self_bleu_is_one_for_copies_and_small_for_disjoint_texts():
    assert self_bleu(torch.arange(12).repeat(3, 1)) == pytest.approx(1.0)
    assert self_bleu(torch.arange(36).view(3, 12)) < 0.06
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu(torch.arange(12)[None])


def test_ngram_js_matches_a_loop_and_its_limits(texts):
    tokens, mask = texts
    reference = torch.randint(0, 3, (5, 20), generator=torch.Generator().manual_seed(3))
    p = Counter(g for row in rows_of(tokens, mask) for g in grams(row, 3))
    q = Counter(g for row in rows_of(reference) for g in grams(row, 3))
    divergence = 0.0
    for g in set(p) | set(q):
        a, b = p[g] / sum(p.values()), q[g] / sum(q.values())
        divergence += sum(x / 2 * math.log2(2 * x / (a + b)) for x in (a, b) if x)
    assert ngram_js(tokens, reference, 3, mask) == pytest.approx(math.sqrt(divergence), abs=1e-12)
    assert ngram_js(tokens, tokens) == 0
    assert ngram_js(tokens, tokens + 50) == pytest.approx(1.0)


def markov(num, length, sharpness, seed):
    """Texts of a fixed random Markov chain; sharpness moves all transition logits."""
    logits = 2 * torch.randn(12, 12, generator=torch.Generator().manual_seed(7))
    p, rng = (sharpness * logits).softmax(-1), torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, 12, (num,), generator=rng)]
    for _ in range(length - 1):
        columns.append(torch.multinomial(p[columns[-1]], 1, generator=rng)[:, 0])
    return torch.stack(columns, 1)


def drawn(num, seed=0):
    """Places of texts that no document holds together."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def test_c2st_cannot_tell_equal_distributions_and_tells_different_ones():
    natural = markov(200, 32, 1.0, 0)
    same, (low, high) = c2st(natural, markov(200, 32, 1.0, 1), places=drawn(200))
    assert low < 0.5 < high and low < same < high
    slightly, _ = c2st(natural, markov(200, 32, 0.8, 2), places=drawn(200))
    clearly, (low, _) = c2st(natural, markov(200, 32, 0.3, 3), places=drawn(200))
    assert same < slightly < clearly and low > 0.85


def test_c2st_sees_order_and_not_only_frequencies():
    natural = markov(200, 32, 1.0, 0)
    shuffled = torch.stack([row[torch.randperm(32, generator=torch.Generator().manual_seed(i))]
                            for i, row in enumerate(markov(200, 32, 1.0, 1))])
    assert c2st(natural, shuffled, places=drawn(200))[0] > 0.9


def test_c2st_on_shuffled_labels_is_at_chance_within_its_interval():
    both, outside, total = markov(160, 24, 1.0, 5), 0, 0.0
    for seed in range(20):
        order = torch.randperm(160, generator=torch.Generator().manual_seed(seed))
        accuracy, (low, high) = c2st(both[order[:80]], both[order[80:]], places=drawn(80, seed))
        outside += not low < 0.5 < high
        total += accuracy / 20
    assert abs(total - 0.5) < 4 * (0.25 / 160 / 20) ** 0.5
    assert outside <= 4  # binomial(20, 0.05) exceeds 4 with probability 0.003


@pytest.mark.parametrize("shared, wilson_alone", [(0.0, 0.95), (0.12, 0.75)])
def test_the_interval_of_an_accuracy_holds_where_neighbours_share_their_fate(shared, wilson_alone):
    """Texts in runs of 32, told with 0.7 plus what a run shares; over 400 corpora each."""
    rng = torch.Generator().manual_seed(0)
    within = {16: 0, 1: 0}
    for _ in range(400):
        chance = 0.7 + shared * torch.randn(32, generator=rng).repeat_interleave(32)
        correct = torch.rand(1024, generator=rng) < chance
        for places in within:  # of one place, none has a neighbour: Wilson's alone
            low, high = clustered_interval(correct, torch.arange(1024) * places // 1024)
            within[places] += low < 0.7 < high
    assert within[16] / 400 > 0.92 and abs(within[1] / 400 - wilson_alone) < 0.06


def test_c2st_cannot_use_words_that_the_windows_of_a_document_share():
    """Natural text against natural text whose documents have topics: every text of a document repeats its own token."""
    rng = torch.Generator().manual_seed(0)
    topics = torch.arange(20).repeat_interleave(16)  # natural documents come in corpus order; half of the 20 are A's
    tokens = markov(320, 24, 1.0, 5)
    topical = torch.where(torch.rand(320, 24, generator=rng) < 0.2, 100 + topics[:, None], tokens)
    order = torch.randperm(320, generator=rng)
    of_a, of_b = (order[topics[order] % 2 == side] for side in (0, 1))
    blind, (low, high) = c2st(topical[of_a], topical[of_b], places=torch.stack([of_a, of_b]))
    assert c2st(topical[of_a], topical[of_b], places=drawn(160))[0] > 0.9 and low < 0.5 < high and low < blind < high
    halves = torch.stack([of_a, of_b]).argsort(1).argsort(1) >= 80  # both sides are cut at the same place
    assert {int(t) for t in topics[of_a[halves[0]]]} == {int(t) for t in topics[of_b[halves[1]]] - 1}


def test_c2st_is_blind_to_padding_and_demands_one_shape():
    natural, generated = markov(100, 24, 1.0, 0), markov(100, 24, 1.0, 1)
    mask = torch.arange(24) < torch.randint(8, 24, (100, 1), generator=torch.Generator().manual_seed(0))
    padded = c2st(natural.masked_fill(~mask, 98), generated.masked_fill(~mask, 99), places=drawn(100), mask=mask)
    assert padded == c2st(natural, generated, places=drawn(100), mask=mask)
    with pytest.raises(ValueError, match="one length"):
        c2st(natural, generated[:, 1:], places=drawn(100))


class Bigram(torch.nn.Module):
    class vocabulary:
        base_size, size = 3, 4

    def __init__(self):
        super().__init__()
        table = torch.tensor([[0.0, 1.0, 2.0, 50.0], [1.0, 0.0, 0.0, 50.0], [0.0, 0.0, 0.0, 50.0]])
        self.table = torch.nn.Parameter(table)

    def forward(self, tokens):
        return self.table[tokens]


def test_judge_counts_completion_tokens_and_excludes_special_ids():
    tokens = torch.tensor([[2, 0, 2, 1], [0, 1, 0, 0]])
    p = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double().log_softmax(-1)
    expected = -(p[0, 2] + p[2, 1] + p[1, 0] + p[0, 0]) / 4
    assert judge_nll(Bigram(), tokens, 2) == pytest.approx(expected.item(), rel=1e-6)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    expected = -(p[0, 2] + p[2, 1] + p[1, 0]) / 3
    assert judge_nll(Bigram(), tokens, 2, mask) == pytest.approx(expected.item(), rel=1e-6)


def test_a_judge_of_a_large_vocabulary_reads_few_rows_at_once(monkeypatch):
    tokens = torch.randint(0, 3, (11, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(10) < torch.arange(11)[:, None]
    whole, judge, logits = judge_nll(Bigram(), tokens, 2, mask), Bigram(), []
    judge.register_forward_hook(lambda module, inputs, output: logits.append(output.numel()))
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 4 * 10 * 4)
    assert judge_nll(judge, tokens, 2, mask) == pytest.approx(whole, rel=1e-6)
    assert logits == [160, 160, 120]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", [None, torch.arange(4) < torch.tensor([[4], [3]])], ids=["whole", "padded"])
def test_a_judge_on_a_gpu_reads_texts_on_the_cpu(mask):
    tokens = torch.tensor([[2, 0, 2, 1], [0, 1, 0, 0]])
    expected = judge_nll(Bigram(), tokens, 2, mask)
    assert judge_nll(Bigram().cuda(), tokens, 2, mask) == pytest.approx(expected, rel=1e-6)


def test_report_measures_completions_only():
    natural, generated = markov(40, 24, 1.0, 0), markov(40, 24, 0.8, 1)
    held_out = markov(60, 24, 1.0, 2)
    settings = {"start": 8, "held_out": held_out, "judge": lambda t: float(t.shape[1]), "places": drawn(40)}
    report = quality_report(natural, generated, **settings)
    assert list(report) == ["judge_nll", "entropy", "distinct_4", "self_bleu", "c2st", "c2st_ci95", "ngram_js"]
    assert report["judge_nll"] == 24 and report["entropy"] == token_entropy(generated[:, 8:])
    generated = torch.cat([torch.full((40, 8), 77), generated[:, 8:]], 1)
    assert report == quality_report(natural, generated, **settings)


def test_report_is_blind_to_padding():
    """Whatever stands at pads of the generated, the natural and the held-out texts."""
    texts = {name: markov(60, 24, spread, seed) for seed, (name, spread) in
             enumerate({"natural": 1.0, "generated": 0.8, "held_out": 1.0}.items())}
    masks = {name: torch.arange(24) < torch.randint(14, 25, (60, 1), generator=torch.Generator().manual_seed(seed))
             for seed, name in enumerate(texts)}
    reports = [
        quality_report(padded["natural"], padded["generated"], start=8, held_out=padded["held_out"],
                       mask=masks["generated"], natural_mask=masks["natural"], held_out_mask=masks["held_out"],
                       judge=lambda t: float(t[masks["generated"]].sum()), places=drawn(60))
        for padded in ({name: text.masked_fill(~masks[name], pad) for name, text in texts.items()} for pad in (98, 99))
    ]
    assert reports[0] == reports[1]


def test_matching_temperature_leaves_pads_out():
    mask = torch.arange(24) < torch.randint(8, 25, (60, 1), generator=torch.Generator().manual_seed(0))
    texts = markov(60, 24, 1.0, 0)
    found = temperature_matching_entropy(lambda t: texts.masked_fill(~mask, 98), token_entropy(texts, mask), mask=mask)
    assert found.temperature == 1.0 and found.entropy == token_entropy(texts, mask)


@pytest.mark.parametrize("wanted", [0.55, 0.9, 1.0, 1.35])
def test_matching_temperature_is_found_within_one_percent_in_few_calls(wanted):
    logits, calls = torch.linspace(0, 4, 20), []
    gumbels = -(-torch.rand(200, 48, 20, generator=torch.Generator().manual_seed(0)).log()).log()

    def generate(temperature):
        calls.append(temperature)
        return (logits / temperature + gumbels).argmax(-1)

    target = token_entropy(generate(wanted))
    calls.clear()
    found = temperature_matching_entropy(generate, target)
    assert abs(found.entropy - target) <= 0.01 * target and len(calls) <= 6
    assert torch.equal(found.tokens, generate(found.temperature))


def test_matching_temperature_out_of_range_returns_the_nearest_end():
    logits = torch.linspace(0, 4, 20)
    gumbels = -(-torch.rand(50, 48, 20, generator=torch.Generator().manual_seed(0)).log()).log()
    for target, end in ((9.0, 2.0), (1e-3, 0.2)):
        found = temperature_matching_entropy(lambda t: (logits / t + gumbels).argmax(-1), target, max_calls=9)
        assert found.temperature == end
