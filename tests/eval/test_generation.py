"""Repetition, loops and where two texts part, on texts that can be counted by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.generation import divergence_point, ends_in_loop, repetition, summary, written
from eval.journal import Journal


def decode(tokens: list[int]) -> str:
    return "".join(chr(97 + token) for token in tokens)


def encode(text: str) -> list[int]:
    return [ord(sign) - 97 for sign in text]


def test_a_text_of_different_words_repeats_nothing() -> None:
    assert repetition(range(30)) == 0


def test_of_one_word_over_and_over_all_but_the_first_is_repetition() -> None:
    assert repetition([7] * 23) == pytest.approx(19 / 20)


def test_a_phrase_said_twice_repeats_its_n_grams_once() -> None:
    assert repetition([*range(10), 99, *range(10)]) == pytest.approx(7 / 18)


def test_a_text_shorter_than_an_n_gram_repeats_nothing() -> None:
    assert repetition([1, 1, 1]) == repetition([]) == 0


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("once upon a time " + "and then " * 3, True),
        ("once upon a time " + "and then " * 2 + "and they ", False),
        ("and then " * 3 + "the end", False),
        ("so " + "z" * 12, True),
        ("so " + "z" * 11, False),
        ("no " * 4, True),
        ("no " * 3, False),
        ("and so on, and so forth; " * 2, False),
        ("", False),
    ],
)
def test_a_loop_is_a_phrase_three_times_over_at_the_very_end(text: str, loops: bool) -> None:
    assert ends_in_loop([ord(sign) for sign in text]) == loops


@pytest.mark.parametrize(
    ("one", "other", "point"),
    [
        ("abcd", "abxd", 2),
        ("abcd", "xbcd", 0),
        ("abcd", "abcd", None),
        ("ab", "abcd", 2),
        ("abcd", "ab", 2),
        ("", "", None),
    ],
)
def test_two_texts_part_at_the_first_token_that_differs(one: str, other: str, point: int | None) -> None:
    assert divergence_point(encode(one), encode(other)) == point


def test_a_text_is_written_once_for_each_prompt_and_length(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def write(prompt: list[int]) -> list[int]:
        asked.append(prompt)
        return [*reversed(prompt)]

    prompts = [[1, 2], [3, 4]]
    assert written(write, prompts, 5, Journal(tmp_path / "journal")) == [[2, 1], [4, 3]]
    assert written(write, [*prompts, [5]], 5, Journal(tmp_path / "journal")) == [[2, 1], [4, 3], [5]]
    written(write, prompts, 6, Journal(tmp_path / "journal"))
    assert asked == [[1, 2], [3, 4], [5], [1, 2], [3, 4]]


def test_alone_a_model_has_habits_and_samples() -> None:
    found = summary([encode("once")], 20, decode, [encode("a" * 20)])
    assert found == {
        "prompts": 1,
        "new_tokens": 20,
        "repetition": pytest.approx(16 / 17),
        "loops": 1,
        "samples": [{"prompt": "once", "text": "a" * 20}],
    }


def compared(texts: list[str], originals: list[str]) -> dict[str, Any]:
    prompts = [encode("once")] * len(texts)
    return summary(prompts, 9, decode, [encode(text) for text in texts], [encode(text) for text in originals])


def test_beside_the_original_it_says_where_they_part() -> None:
    found = compared(["abcd", "abcd", "abcd"], ["abcd", "xbcd", "abcx"])
    assert found["divergence_points"] == [None, 0, 3]
    assert found["divergence_point"] == 3
    assert found["identical"] == pytest.approx(1 / 3)
    assert [sample["divergence_point"] for sample in found["samples"]] == [None, 0, 3]
    assert found["samples"][1] == {"prompt": "once", "text": "abcd", "baseline_text": "xbcd", "divergence_point": 0}


def test_texts_that_mostly_stay_the_same_have_no_median_point() -> None:
    assert compared(["abcd", "abcd", "abcd"], ["abcd", "abcd", "abcx"])["divergence_point"] is None


def test_only_some_texts_are_kept_whole_and_all_are_counted() -> None:
    found = compared(["ab"] * 20, ["ax"] * 20)
    assert (len(found["samples"]), len(found["divergence_points"]), found["prompts"]) == (8, 20, 20)
