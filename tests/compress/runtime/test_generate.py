"""`generate` gives the text that transformers gives, and turns away what cannot be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import DataError, RequestError
from compress.runtime.generate import generate
from compress.runtime.load import load


@pytest.fixture(scope="module")
def stories(assets: Path) -> tuple[Any, Any]:
    return load(assets / "models/stories260k")


def test_it_gives_the_text_that_transformers_gives(stories: tuple[Any, Any]) -> None:
    model, tokenizer = stories
    prompt = "Once upon a time"
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                max_new_tokens=40, do_sample=False, pad_token_id=2)  # fmt: skip
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert generate(model, tokenizer, prompt, max_new_tokens=40) == expected


def test_it_tells_the_story_the_model_is_known_for(stories: tuple[Any, Any]) -> None:
    text = generate(*stories, "Once upon a time", max_new_tokens=40)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


def test_options_reach_transformers(stories: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    sampled = generate(*stories, "Once upon a time", max_new_tokens=20, do_sample=True, temperature=5.0)
    assert sampled != generate(*stories, "Once upon a time", max_new_tokens=20)


def test_options_alone_do_not_make_it_sample(stories: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = stories
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    texts = {generate(model, tokenizer, "Once", max_new_tokens=20, repetition_penalty=1.2) for _ in range(3)}
    assert len(texts) == 1


def test_what_the_generation_config_asks_for_is_done(stories: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = stories
    plain = generate(model, tokenizer, "Once upon a time", max_new_tokens=40)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    assert generate(model, tokenizer, "Once upon a time", max_new_tokens=40) != plain


def test_an_empty_prompt_is_refused(stories: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="prompt is empty"):
        generate(*stories, "")


def test_no_new_tokens_are_no_request(stories: tuple[Any, Any]) -> None:
    with pytest.raises(RequestError, match="max_new_tokens=0"):
        generate(*stories, "Once", max_new_tokens=0)


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(stories: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"max_new_tokens=510 .* context of 512"):
        generate(*stories, "Once upon a time there was a little girl", max_new_tokens=510)
