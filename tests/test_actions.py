import pytest

from grpo.actions import credited_tokens, credits_positions


def test_discarded_proposals_are_left_out_only_where_they_had_no_say():
    assert credited_tokens("auto", "random", False) == "kept" and credited_tokens("all", "random", False) == "all"
    for remasking, sampler in (("confidence", False), ("critic", False), ("self", True), ("random", True)):
        assert credited_tokens("auto", remasking, sampler) == "all" == credited_tokens("all", remasking, sampler)


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
