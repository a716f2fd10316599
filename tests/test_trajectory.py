import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from grpo.config import DenoiseSection, ModelSection
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.tokenizer import Vocabulary
from grpo.trajectory import (
    action_tables,
    credited,
    credited_tokens,
    credits_positions,
    most_actions,
    policy_log_probs,
    roll_out,
    trajectory_logprobs,
)

torch.set_num_threads(1)
V = T = 3
MASK = V
BIAS = 0.7
REWARDS = torch.randn(V**T, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def make_model(base=V, *, causal=False, block_size=T, dtype=torch.float64):
    torch.manual_seed(0)
    kind = dict(attention="causal", critic=False, sampler=False) if causal else {}
    section = ModelSection(n_layer=1, n_head=2, n_embd=8, position="learned", **kind)
    model = GPT(section, Vocabulary(base), block_size=block_size, lm_residual=4).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.18 if "heads.lm" in name else 0.3 if "heads" in name else 0.5)
    model.freeze_trunk()
    return model


def rolled(model, rows, *, remasking="random", positions=False, policy_tokens="all", length=T, prompt=0, replay=False,
           **settings):
    """One sample for each seed in `rows`, of prompts of zeros."""
    prompts = torch.zeros(len(rows), length, dtype=torch.int64)
    return roll_out(
        model,
        prompts,
        torch.ones_like(prompts, dtype=torch.bool),
        prompt_tokens=prompt,
        group_size=1,
        seeds=row_seeds(1, 0, 0, rows),
        settings=DenoiseSection(**{"steps": 2, **settings}),
        remasking=remasking,
        policy_tokens=policy_tokens,
        positions=positions,
        replay=replay,
        mask_bias=BIAS,
        min_neighbors_ratio=0.01,
        policy_version=0,
    )


# ---- the definition: every trajectory of a tiny model, from full forwards and Python loops ---------------------------


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


def gradient(model, total):
    parameters = list(model.heads.parameters())
    parts = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts, strict=True)]
    )


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


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


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


# ---- larger rollouts -------------------------------------------------------------------------------------------------

KINDS = {
    "parallel": dict(remasking="random"),
    "kept": dict(remasking="random", policy_tokens="kept"),
    "confidence": dict(remasking="confidence", randomness=0.5, positions=True),
    "critic": dict(remasking="critic", randomness=0.5, positions=True),
    "self": dict(remasking="self", randomness=0.5, positions=True),
    "wavefront": dict(remasking="self", randomness=0.5, positions=True, sampler=True),
    "causal": dict(causal=True),
}


def large(kind, rows=None, dtype=torch.float32, **settings):
    options = dict(KINDS[kind])
    model = make_model(20, causal=options.pop("causal", False), block_size=16, dtype=dtype)
    rows = torch.arange(12) if rows is None else rows
    settings = {"steps": 4, "temperature": 0.7, "top_p": 0.8, **settings}
    return model, rolled(model, rows, length=16, prompt=4, **options, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_states_give_the_rollouts_logprobs_with_temperature_and_nucleus(kind):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model, rollout = large(kind, dtype=dtype)
        with torch.no_grad():
            again = trajectory_logprobs(model, rollout)
        before = credited(rollout, "logprobs")
        assert ((again - before).abs() <= tolerance * before.abs().clamp(min=1)).all()
        ratio = (again - before).exp()
        assert (ratio - 1).abs().max() < 10 * tolerance  # the first iteration's: 1, up to rounding
        assert (rollout.choices is None) == (kind in ("parallel", "kept", "causal"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kept"])
def test_cached_states_equal_a_replay_through_the_full_model(kind):
    """Rebuild each step's input from the actions alone, run the whole model on it, and compare log-probabilities."""
    model, rollout = large(kind)
    positions, rows = rollout.positions, rollout.rows
    text = torch.zeros(12, 16, dtype=torch.int64)
    text[:, 4:] = 20
    with torch.no_grad():
        for step in range(int(rollout.steps.max()) + 1):
            now = rollout.steps == step
            r, p = rows[now], positions[now]
            if kind == "causal":
                states = model.encode(rollout.tokens)[r, p - 1]
            else:
                text[r, p] = 20
                assert (text == 20).sum() == now.sum()
                states = model.encode(text)[r, p]
            torch.testing.assert_close(states, rollout.hidden[now], rtol=1e-5, atol=1e-5)
            if kind != "wavefront":
                logits = model.heads["lm"](states)[:, :20] / 0.7
                logits[~rollout.support[now]] = -math.inf
                logprobs = logits.log_softmax(-1).gather(1, rollout.actions[now][:, None])[:, 0]
                torch.testing.assert_close(logprobs, rollout.logprobs[now], rtol=1e-5, atol=1e-5)
                mass = (model.heads["lm"](states)[:, :20] / 0.7).softmax(-1).mul(rollout.support[now]).sum(-1)
                assert (mass >= 0.8 - 1e-6).all()
            text[r, p] = rollout.actions[now]
            if rollout.choices is not None and step < 3:
                again = rollout.choices.steps == step
                text_now, after = text.clone(), text.clone()
                after[rollout.choices.rows[again], rollout.choices.actions[again]] = 20
                if kind in ("self", "wavefront", "critic"):
                    e = rollout.choices.eligible[12 * step : 12 * step + 12]
                    start = int(rollout.choices.eligible[: 12 * step].sum())
                    judged = rollout.choices.hidden[start : start + int(e.sum())]
                    torch.testing.assert_close(model.encode(text_now)[e], judged, rtol=1e-5, atol=1e-5)
                text = after
    assert torch.equal(text, rollout.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trajectory_does_not_depend_on_its_batch(kind):
    model, together = large(kind)
    for row in (0, 5, 11):
        _, alone = large(kind, torch.tensor([row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        mine = credited(together, "rows") == row
        torch.testing.assert_close(
            credited(alone, "logprobs"), credited(together, "logprobs")[mine], rtol=1e-5, atol=1e-6
        )
        with torch.no_grad():
            torch.testing.assert_close(
                trajectory_logprobs(model, alone), trajectory_logprobs(model, together)[mine], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_normalised_over_possible_actions(kind):
    model, rollout = large(kind)
    for table in action_tables(model, rollout):
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(len(table), dtype=table.dtype))
    assert torch.equal(action_tables(model, rollout)[0] > -math.inf, rollout.support)
    if rollout.choices is not None:
        drawn = rollout.choices
        assert drawn.left.gather(1, drawn.actions[:, None]).all()
        assert torch.equal(credited(rollout, "positions")[len(rollout.positions) :], drawn.actions)


@pytest.mark.parametrize("kind", KINDS)
def test_most_actions_is_what_a_full_sample_has(kind):
    for steps, schedule in ((1, "linear"), (3, "linear"), (4, "cosine")):
        model, rollout = large(kind, steps=steps, schedule=schedule)
        counts = torch.bincount(credited(rollout, "rows"), minlength=12)
        most = most_actions(
            12,
            DenoiseSection(steps=steps, schedule=schedule),
            causal=model.trunk.causal,
            policy_tokens=KINDS[kind].get("policy_tokens", "all"),
            positions="positions" in KINDS[kind],
        )
        assert counts.tolist() == [most] * 12


def test_samples_of_a_group_lie_side_by_side_and_pads_are_never_actions():
    model = make_model(20, block_size=10)
    prompts = torch.arange(30).view(3, 10) % 20
    real = torch.arange(10) < torch.tensor([[10], [7], [4]])
    rollout = roll_out(
        model,
        prompts,
        real,
        prompt_tokens=3,
        group_size=4,
        seeds=row_seeds(0, 0, 0, torch.arange(12)),
        settings=DenoiseSection(steps=3, remasking="self", randomness=0.5),
        remasking="self",
        policy_tokens="all",
        positions=True,
        mask_bias=0.0,
        min_neighbors_ratio=0.01,
        policy_version=7,
    )
    for n, g in itertools.product(range(3), range(4)):
        row = rollout.tokens[4 * n + g]
        assert torch.equal(row[:3], prompts[n, :3]) and torch.equal(row[~real[n]], prompts[n][~real[n]])
    assert len(rollout.tokens[:4].unique(dim=0)) == 4
    assert rollout.completion_mask.sum(1).tolist() == [7] * 4 + [4] * 4 + [1] * 4
    assert rollout.completion_mask[credited(rollout, "rows"), credited(rollout, "positions")].all()
    assert not (rollout.choices.eligible & ~rollout.completion_mask.repeat(2, 1)).any()
    assert rollout.policy_version == 7 and rollout.group_size == 4


def test_a_rollout_moves_as_a_whole():
    _, rollout = large("self")
    moved = rollout.to("meta")
    assert moved.hidden.is_meta and moved.choices.hidden.is_meta and moved.neighbors is None
    assert replace(moved, choices=None).to("meta").choices is None


def test_policy_log_probs_are_those_of_the_sampling_temperature():
    model, rollout = large("parallel", top_p=1.0)
    expected = (model.heads["lm"](rollout.hidden)[:, :20] / 0.7).log_softmax(-1)
    torch.testing.assert_close(policy_log_probs(model, rollout), expected)
    assert rollout.support is None


def test_credit_that_would_bias_the_gradient_is_refused():
    assert credited_tokens("auto", "random", False) == "kept" == credited_tokens("kept", "random", False)
    for remasking, sampler in (("confidence", False), ("critic", False), ("self", True), ("random", True)):
        assert credited_tokens("auto", remasking, sampler) == "all" == credited_tokens("all", remasking, sampler)
        with pytest.raises(ValueError, match="grpo.policy_tokens must be all or auto when denoise"):
            credited_tokens("kept", remasking, sampler)


def test_positions_are_actions_where_the_heads_choose_at_random():
    assert credits_positions(False, "self", 0.5)
    assert not any(credits_positions(False, p, r) for p, r in (("self", 0.0), ("self", 1.0), ("critic", 0.5)))
    assert all(credits_positions(True, policy, 0.5) for policy in ("self", "confidence", "critic"))
    for policy in ("random", "model"):
        with pytest.raises(ValueError, match="grpo.policy_positions must be false"):
            credits_positions(True, policy, 0.5)
    for randomness in (0.0, 1.0):
        with pytest.raises(ValueError, match="denoise.randomness must be strictly between"):
            credits_positions(True, "self", randomness)
