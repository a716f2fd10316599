"""Every trajectory of a tiny model, from full forwards and Python loops, against the rollout and its gradient."""

import itertools
import math
from functools import cache

import pytest
import torch

from grpo.trajectory import credited, trajectory_logprobs
from tests.small_rollouts import BIAS, T, V, gradient, make_model, relative, rolled

torch.set_num_threads(1)
MASK = V
REWARDS = torch.randn(V**T, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class Enumeration:
    """All ways in which [MASK][MASK][MASK] becomes text in two steps: key -> (log P(tokens), log P(re-masked))."""

    def __init__(
        self,
        model,
        *,
        remasking,
        randomness,
        temperature=1.0,
        top_p=1.0,
        sampler=False,
        schedule="linear",
        ordered=False,
    ):
        self.model, self.temperature, self.top_p, self.sampler = model, temperature, top_p, sampler
        self.logits = cache(lambda text: model(torch.tensor([text]))[0, :, : V + 1])
        count = T * 1 // 2 if schedule == "linear" else math.floor(T * math.cos(math.pi / 4))
        self.paths = {}
        for first, log_first, confidence in self.fills((MASK,) * T):
            weights = self.weights(remasking, randomness, first, confidence)
            for order in itertools.permutations(range(T), count):
                log_remask, left = 0.0, list(range(T))
                for position in order:
                    log_remask = log_remask + weights[position] - torch.stack([weights[i] for i in left]).logsumexp(0)
                    left.remove(position)
                again = tuple(MASK if i in order else token for i, token in enumerate(first))
                for text, log_second, _ in self.fills(again):
                    chosen = order if ordered else tuple(sorted(order))
                    key = (first, chosen, text)
                    old = self.paths.get(key)
                    both = log_remask if old is None else torch.logaddexp(old[1], log_remask)  # in either order
                    self.paths[key] = (log_first + log_second, both)

    def log_probabilities(self, logits):
        """[V] log-probabilities under temperature and nucleus, by a loop."""
        p = (logits[:V] / self.temperature).softmax(0)
        kept, mass = set(), 0.0
        for token in p.argsort(descending=True).tolist():
            if mass < self.top_p:
                kept.add(token)
            mass += p[token].item()
        total = sum(p[token] for token in kept)
        return {token: (p[token] / total).log() for token in kept}

    def fills(self, text):
        """Every fill of a text: (filled, log-probability, log-probability of each token untempered by position)."""
        masks = [i for i in range(T) if text[i] == MASK]
        if not masks:
            return [(text, torch.zeros((), dtype=torch.float64), {})]
        if not self.sampler:
            return self.extend(text, {i: self.logits(text)[i] for i in masks}, self.done)
        return self.wave(text, self.model.encode(torch.tensor([text]))[0])

    def done(self, text):
        return [(text, torch.zeros((), dtype=torch.float64), {})]

    def extend(self, text, logits, rest):
        out = []
        tables = {i: self.log_probabilities(logits[i]) for i in logits}
        for tokens in itertools.product(*(tables[i] for i in logits)):
            drawn = dict(zip(logits, tokens, strict=True))
            log_p = sum(tables[i][token] for i, token in drawn.items())
            plain = {i: logits[i][:V].log_softmax(0)[token] for i, token in drawn.items()}
            new = tuple(drawn.get(i, token) for i, token in enumerate(text))
            out += [(done, log_p + log_rest, plain | more) for done, log_rest, more in rest(new)]
        return out

    def wave(self, text, hidden):
        masks = [i for i in range(T) if text[i] == MASK]
        if not masks:
            return self.done(text)
        known = lambda i: 0 <= i < T and text[i] != MASK  # noqa: E731
        ready = [i for i in masks if known(i - 1) or known(i + 1)]
        lm, wte = self.model.heads["lm"], self.model.trunk.wte.weight
        if ready:
            logits = {}
            for i in (i for i in ready if i - 1 not in ready):
                sides = [wte[text[j]] if known(j) else torch.zeros(8, dtype=torch.float64) for j in (i - 1, i + 1)]
                logits[i] = lm(self.model.heads["sampler"](hidden[i], *sides))[: V + 1]
        else:
            best = max(masks, key=lambda i: lm(hidden[i])[:V].log_softmax(0).max().item())
            logits = {best: lm(hidden[best])[: V + 1]}
        return self.extend(text, logits, lambda new: self.wave(new, hidden))

    def weights(self, remasking, randomness, text, confidence):
        """log-weights of the re-masking draw, by position."""
        scale = (1 - randomness) / randomness
        if remasking == "random":
            return [torch.zeros((), dtype=torch.float64)] * T
        if remasking == "confidence":
            return [scale * (1 - confidence[i].exp()).log() for i in range(T)]
        if remasking == "critic":
            return list(scale * self.model.critic_scores(torch.tensor([text]))[0].sigmoid().log())
        logits = self.logits(text) + torch.tensor([0.0] * V + [BIAS], dtype=torch.float64)
        return list(scale * logits.softmax(-1)[:, V].log())


def reward(text):
    return REWARDS[sum(token * V**i for i, token in enumerate(text))]


def keys_of(rollout):
    """(first fill, re-masked positions, text) of each row; positions in the order drawn where they are actions."""
    per_step = [[{} for _ in rollout.tokens] for _ in range(2)]
    fields = (rollout.rows, rollout.positions, rollout.steps, rollout.actions)
    for row, position, step, token in zip(*(x.tolist() for x in fields), strict=True):
        per_step[step][row][position] = token
    orders = [tuple(sorted(each)) for each in per_step[1]]
    if rollout.choices is not None:
        drawn = [[] for _ in rollout.tokens]
        for row, position in zip(rollout.choices.rows.tolist(), rollout.choices.actions.tolist(), strict=True):
            drawn[row].append(position)
        orders = [tuple(each) for each in drawn]
    firsts = [tuple(each[i] for i in range(T)) for each in per_step[0]]
    return list(zip(firsts, orders, map(tuple, rollout.tokens.tolist()), strict=True))


def every_trajectory(model, num, **options):
    """Seeds that together visit every trajectory once, found by sampling: a row's text depends on its seed alone."""
    rows = torch.arange(num)
    first = {}
    for row, key in enumerate(keys_of(rolled(model, rows, **options))):
        first.setdefault(key, row)
    return rows[list(first.values())], list(first)


CASES = {
    "random": dict(remasking="random"),
    "random, sharper": dict(remasking="random", temperature=0.6, top_p=0.9),
    "confidence": dict(remasking="confidence", randomness=0.5),
    "confidence with positions": dict(remasking="confidence", randomness=0.5, positions=True, schedule="cosine"),
    "critic": dict(remasking="critic", randomness=0.5),
    "critic with positions": dict(remasking="critic", randomness=0.5, positions=True, schedule="cosine"),
    "self": dict(remasking="self", randomness=0.4, positions=True, schedule="cosine"),
    "wavefront": dict(remasking="random", sampler=True),
    "wavefront, sharper": dict(remasking="random", sampler=True, temperature=0.7, top_p=0.95),
    "wavefront, self": dict(remasking="self", randomness=0.4, positions=True, sampler=True),
    "wavefront, confidence with positions": dict(remasking="confidence", randomness=0.5, positions=True, sampler=True),
}


def enumerated(model, positions=False, **options):
    return Enumeration(model, ordered=positions, **{"randomness": 1.0, **options})


def expected_gradient(model, seeds, probabilities, **options):
    """Sum over all trajectories of p R grad log p(credited actions), from cached states."""
    rollout = rolled(model, seeds, **options)
    scores = torch.zeros(len(seeds), dtype=torch.float64).index_add(
        0, credited(rollout, "rows"), trajectory_logprobs(model, rollout)
    )
    earned = torch.stack([reward(text) for text in rollout.tokens.tolist()])
    return gradient(model, (probabilities * earned * scores).sum())


@pytest.mark.parametrize("case", CASES)
def test_enumerated_trajectories_sum_to_one_and_give_the_exact_policy_gradient(case):
    model, options = make_model(), CASES[case]
    exact = enumerated(model, **options)
    seeds, keys = every_trajectory(model, 100_000 if options.get("schedule") else 30_000, **options)
    assert set(keys) == set(exact.paths)
    rollout = rolled(model, seeds, **options)
    log_tokens, log_remask = torch.stack([torch.stack(exact.paths[key]) for key in keys]).detach().unbind(1)

    sums = torch.zeros(len(seeds), dtype=torch.float64)
    behaviour = sums.index_add(0, rollout.rows, rollout.logprobs)
    torch.testing.assert_close(behaviour, log_tokens, rtol=0, atol=1e-11)
    if options.get("positions"):
        drawn = sums.index_add(0, rollout.choices.rows, rollout.choices.logprobs)
        torch.testing.assert_close(drawn, log_remask, rtol=0, atol=1e-10)
        probabilities = (behaviour + drawn).exp()
    else:
        assert rollout.choices is None
        probabilities = (behaviour + log_remask).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-10)

    part = (lambda x: x) if options.get("positions") else torch.Tensor.detach  # the remasker, where it is environment
    value = sum((tokens + part(remask)).exp() * reward(key[2]) for key, (tokens, remask) in exact.paths.items())
    found = expected_gradient(model, seeds, probabilities, **options)
    assert relative(found, gradient(model, value)) < 1e-8


@pytest.mark.parametrize(
    ("case", "complete"),
    [("random", True), ("random, sharper", True), ("confidence", False), ("critic", False), ("wavefront", False)],
)
def test_kept_tokens_suffice_only_where_discarded_ones_change_nothing(case, complete):
    model, options = make_model(), CASES[case]
    exact = enumerated(model, **options)
    seeds, keys = every_trajectory(model, 30_000, **options)
    probabilities = torch.stack([sum(exact.paths[key]).exp() for key in keys]).detach()
    every, kept = (expected_gradient(model, seeds, probabilities, policy_tokens=p, **options) for p in ("all", "kept"))
    error = relative(kept, every)
    assert error < 1e-8 if complete else error > 1e-3


def test_a_policy_that_remasks_by_itself_must_credit_its_choices():
    model, options = make_model(), CASES["wavefront, self"]
    exact = enumerated(model, **options)
    seeds, keys = every_trajectory(model, 30_000, **options)
    probabilities = torch.stack([sum(exact.paths[key]).exp() for key in keys]).detach()
    with_choices = expected_gradient(model, seeds, probabilities, **options)
    without = expected_gradient(model, seeds, probabilities, **(options | {"positions": False}))
    assert relative(without, with_choices) > 1e-2


def test_causal_trajectories_sum_to_one_and_give_the_exact_policy_gradient():
    model = make_model(causal=True)
    options = dict(prompt=1, temperature=0.8, top_p=0.97)
    seeds, texts = {}, rolled(model, torch.arange(4000), **options).tokens
    for row, text in enumerate(texts.tolist()):
        seeds.setdefault(tuple(text), row)
    rollout = rolled(model, torch.tensor(list(seeds.values())), **options)
    loop = Enumeration.__new__(Enumeration)
    loop.temperature, loop.top_p = 0.8, 0.97
    exact = {}
    for pair in itertools.product(range(V), repeat=2):
        logits = model(torch.tensor([(0, *pair)]))[0]
        tables = [loop.log_probabilities(row) for row in logits]
        if all(token in tables[i] for i, token in enumerate(pair)):
            exact[(0, *pair)] = sum(tables[i][token] for i, token in enumerate(pair))
    assert set(exact) == set(seeds)
    logprob = torch.zeros(len(seeds), dtype=torch.float64).index_add(0, rollout.rows, rollout.logprobs)
    torch.testing.assert_close(logprob, torch.stack([exact[text] for text in seeds]).detach(), rtol=0, atol=1e-11)
    assert logprob.exp().sum().item() == pytest.approx(1, abs=1e-10)
    found = expected_gradient(model, torch.tensor(list(seeds.values())), logprob.exp(), **options)
    assert relative(found, gradient(model, sum(p.exp() * reward(text) for text, p in exact.items()))) < 1e-8
