import re
from random import Random

import pytest
import torch

from benchmarks.discriminator import in_order
from benchmarks.grammar import BLOCK, GRAMMARS, corpus, figures, is_balanced, is_sorted

torch.set_num_threads(1)


def reduces_to_nothing(sentence):
    """Balanced, by striking out adjacent pairs until none is left."""
    before = None
    while before != sentence:
        before, sentence = sentence, re.sub(r"\(\)|\[\]|\{\}|<>", "", sentence)
    return not sentence


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_every_sentence_made_is_valid_and_fits(grammar):
    rng, (make, valid) = Random(1), GRAMMARS[grammar]
    sentences = [make(rng) for _ in range(300)]
    assert all(map(valid, sentences)) and len(set(sentences)) > 200
    assert {len(sentence) for sentence in sentences} == set(range(4, 13, 1 if grammar == "sorted" else 2))


def test_brackets_agree_with_striking_out_pairs():
    rng = Random(2)
    for _ in range(500):
        sentence = "".join(rng.choices("()[]<>", k=4))
        assert is_balanced(sentence) == reduces_to_nothing(sentence)
    assert not is_balanced("") and is_balanced("([]{<>})") and not is_balanced("([)]")


def test_order_agrees_with_a_loop_over_neighbours():
    assert is_sorted("aabz") and not any(map(is_sorted, ("ba", "", "a.b", "aB")))
    rows = ["abcab...", "aabb....", "bcdefghi"]
    tokens = torch.tensor([list(row.encode()) for row in rows])
    expected = [[True] * 8 for _ in rows]
    expected[0][2] = expected[0][3] = False
    assert in_order(tokens, tokens != ord(".")).tolist() == expected


def test_figures_by_hand():
    found = figures("sorted", ["abc", "abc", "cba", "aab"], ["abc", "bca"])
    assert (found["valid"], found["distinct"]) == (0.75, 0.75)
    assert found["letters_js"] > 0 and figures("sorted", ["ab", "cc"], ["cc", "ba"])["letters_js"] == 0


def test_the_corpus_is_distinct_sentences(tmp_path):
    lines = corpus("brackets", tmp_path).read_text().split("\n\n")
    assert len(set(lines)) == len(lines) > 10_000 and max(map(len, lines)) == BLOCK
    assert all(map(is_balanced, lines[:200]))
