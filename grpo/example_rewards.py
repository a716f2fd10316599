"""Reward functions to start from; named in a config as `grpo.example_rewards:vowel_share`.

Each takes completions and returns one number per text (see `grpo/reward_functions.py`).
"""

from __future__ import annotations

BRACKETS = {")": "(", "]": "[", "}": "{"}


def vowel_share(texts: list[str]) -> list[float]:
    """Share of lower-case vowels among a text's characters."""
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in texts]


def balanced_brackets(texts: list[str]) -> list[float]:
    """1 for a text whose brackets all match, less the share of its characters that are unmatched brackets."""
    return [1 - _unmatched(text) / max(1, len(text)) for text in texts]


def _unmatched(text: str) -> int:
    open_, wrong = [], 0
    for character in text:
        if character in BRACKETS.values():
            open_.append(character)
        elif character in BRACKETS:
            if open_ and open_[-1] == BRACKETS[character]:
                open_.pop()
            else:
                wrong += 1
    return wrong + len(open_)
