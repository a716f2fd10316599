import re
from random import Random

import pytest
import torch

from benchmarks.discriminator import in_order
from benchmarks.grammar import BLOCK, END, GRAMMARS, corpus, figures, is_balanced, is_sorted, sentence_of

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
    assert all(map(valid, sentences)) and len(set(sentences)) > 280
    assert {len(sentence) for sentence in sentences} == set(range(4, 21, 1 if grammar == "sorted" else 2))


def test_brackets_agree_with_striking_out_pairs():
    rng = Random(2)
    for _ in range(500):
        sentence = "".join(rng.choices("()[]<>", k=4))
        assert is_balanced(sentence) == reduces_to_nothing(sentence)
    assert not is_balanced("") and is_balanced("([]{<>})") and not is_balanced("([)]")


def test_order_agrees_with_a_loop_over_neighbours():
    assert is_sorted("aabz") and not any(map(is_sorted, ("ba", "", "a.b", "aB")))
    rows = ["abca....", "aabb....", "ab.c....", "bcdefghi"]
    expected = [[True] * 8 for _ in rows]
    for row, at in ((0, 2), (2, 2)):
        expected[row][at] = expected[row][at + 1] = False
    assert in_order(torch.tensor([list(row.encode()) for row in rows])).tolist() == expected


def test_a_sentence_with_text_after_its_end_is_invalid(tmp_path):
    assert sentence_of("abc....") == "abc" and not is_sorted(sentence_of("abc..d."))
    found = figures("sorted", ["abc.", "abc.", "cba.", "ab.c"], ["abc.", "abcd"])
    assert (found["valid"], found["distinct"], found["mean_length"]) == (0.5, 0.75, 3.25)


def test_the_corpus_is_distinct_filled_up_sentences(tmp_path):
    lines = corpus("brackets", tmp_path).read_text().split("\n\n")
    assert len(set(lines)) == len(lines) > 10_000 and {len(line) for line in lines} == {BLOCK}
    assert all(is_balanced(line.rstrip(END)) for line in lines[:200])
