import torch

from grpo.noise import (
    FILL,
    HIDE_LEFT,
    HIDE_RIGHT,
    JITTER,
    KIND,
    OFFSET,
    ORDER,
    PROPOSE,
    REMASK,
    SEED,
    SHARE,
    SOURCE,
    STRATUM,
    row_seeds,
    to_gumbels,
    uniforms,
)


def test_uniforms_match_splitmix64_in_python_integers():
    word = (1 << 64) - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    def absorb(state, counter):
        return mix((state * 3 + 0x9E3779B97F4A7C15 + counter * 0x9E3779B97F4A7C15) & word)

    seed, counters = 123456789, (5, 7)
    state = seed
    for counter in counters:
        state = absorb(state, counter)
    expected = ((mix(state) >> 11) + 0.5) * 2.0**-53
    assert uniforms(torch.tensor([seed]), *counters).item() == expected


def test_uniforms_are_uniform_and_uncorrelated_between_counters():
    seeds = row_seeds(0, 1, 2, torch.arange(200))
    u = uniforms(seeds[:, None], 3, torch.arange(500)[None])
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert (
        abs(torch.corrcoef(torch.stack([u[:, 1:].flatten(), u[:, :-1].flatten()]))[0, 1].item()) < 4 / u.numel() ** 0.5
    )
    counts = torch.histc(u, 20, 0, 1)
    chi2 = ((counts - u.numel() / 20) ** 2 / (u.numel() / 20)).sum().item()
    assert chi2 < 45  # 19 degrees of freedom: beyond the 99.9th percentile (43.8)


def test_a_row_does_not_depend_on_its_batch_mates():
    seeds = row_seeds(0, 1, 2, torch.arange(8))
    together = uniforms(seeds[:, None], torch.arange(5)[None])
    alone = uniforms(seeds[3:4, None], torch.arange(5)[None])
    assert torch.equal(together[3:4], alone)


def test_gumbel_argmax_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    noise = to_gumbels(uniforms(row_seeds(1, 0, 0, torch.arange(40_000))[:, None], torch.arange(3)[None]))
    frequency = torch.bincount((logits + noise).argmax(-1), minlength=3) / 40_000
    assert (frequency - logits.softmax(0)).abs().max() < 0.01


def test_two_purposes_or_streams_never_share_a_draw():
    row = (STRATUM, JITTER, SHARE, KIND, OFFSET, SOURCE, ORDER, FILL, HIDE_LEFT, HIDE_RIGHT)
    assert len(set(row)) == len(row) and len({PROPOSE, SEED, REMASK}) == 3
    seeds = row_seeds(1, 2, 3, torch.arange(4))
    for other in ((9, 2, 3), (1, 9, 3), (1, 2, 9)):
        assert not (row_seeds(*other, torch.arange(4)) == seeds).any()
