"""Answers belong to the question, and to the tokenizer that puts it to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from eval.journal import Journal

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install netsuke[tasks]")

from lm_eval.api.instance import Instance

from eval.respondent import Respondent, _identity

QUESTIONS = [("once", " upon"), ("once", " a time"), ("every", " detail")]


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def recalled(tiny: Path, tokenizer: Any, journal: Journal) -> int:
    """How many answers were in the journal."""
    before = journal.found
    asked = [Instance("loglikelihood", {}, question, place) for place, question in enumerate(QUESTIONS)]
    model = Respondent(AutoModelForCausalLM.from_pretrained(tiny), tokenizer, journal=journal)
    assert all(likelihood < 0 for likelihood, _ in model.loglikelihood(asked))
    return journal.found - before


def test_what_another_tokenizer_asked_was_not_asked(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert recalled(tiny, tokenizer, journal) == 0
    assert recalled(tiny, tokenizer, journal) == len(QUESTIONS)
    other = AutoTokenizer.from_pretrained(tiny)
    words = other.get_vocab()
    turned = {word: len(words) + 1 - token if token > 1 else token for word, token in words.items()}
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)(turned, [])
    assert recalled(tiny, other, journal) == 0
    assert recalled(tiny, tokenizer, journal) == len(QUESTIONS)


def test_special_tokens_are_of_a_tokenizer(tokenizer: Any) -> None:
    before = _identity(tokenizer)
    tokenizer.eos_token = "a"
    assert _identity(tokenizer) != before


def test_a_tokenizer_that_padded_a_batch_is_the_same(tokenizer: Any) -> None:
    before = _identity(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["once", "once upon a time"], padding="longest", truncation=True, max_length=8)
    assert _identity(tokenizer) == before


def test_a_tokenizer_in_python_is_known_by_its_words() -> None:
    assert _identity(ByT5Tokenizer()) == _identity(ByT5Tokenizer()) != _identity(ByT5Tokenizer(extra_ids=9))
