"""Scores of small known models, and of a real one against transformers' own loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from eval import evaluate
from eval.evaluate import (
    LogitsModel,
    ScoreError,
    default_batch_size,
    default_context,
    logits_of,
    score_texts,
)
from eval.journal import Journal
from eval.texts import read_documents, tokenize, windows

VOCABULARY = 11
TEXTS = {"walk": torch.randint(VOCABULARY, (77,), generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({str(index): index for index in range(VOCABULARY)}, unk_token="0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="0")


def uniform(input_ids: Tensor, /) -> Tensor:
    return torch.zeros(*input_ids.shape, VOCABULARY)


def bigram(seed: int) -> LogitsModel:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda input_ids: table[input_ids]


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tokenizer: Any) -> None:
    (score,) = score_texts(uniform, tokenizer, TEXTS, context=8)
    assert score["perplexity"] == pytest.approx(VOCABULARY)


def test_the_first_token_of_a_window_is_not_scored(tokenizer: Any) -> None:
    (score,) = score_texts(uniform, tokenizer, TEXTS, context=8)
    assert (score["tokens"], score["context"]) == (77 // 8 * 7, 8)


def test_without_a_baseline_nothing_is_said_about_one(tokenizer: Any) -> None:
    (score,) = score_texts(uniform, tokenizer, TEXTS, context=8)
    assert set(score) == {"name", "perplexity", "tokens", "context"}


def test_a_model_is_equal_to_itself(tokenizer: Any) -> None:
    (score,) = score_texts(bigram(0), tokenizer, TEXTS, context=8, baseline=bigram(0))
    measures = ("kl_divergence", "kl_p99", "top1_agreement", "perplexity_ratio", "kl_standard_error")
    assert [score[key] for key in measures] == [0, 0, 1, 1, 0]


def test_the_ratio_is_that_of_the_perplexities(tokenizer: Any) -> None:
    (score,) = score_texts(bigram(0), tokenizer, TEXTS, context=8, baseline=bigram(1))
    assert score["perplexity_ratio"] == pytest.approx(score["perplexity"] / score["baseline_perplexity"])


def test_the_divergence_from_a_uniform_baseline_is_its_closed_form(tokenizer: Any) -> None:
    logits = torch.arange(VOCABULARY, dtype=torch.float32)
    (score,) = score_texts(lambda ids: logits.expand(*ids.shape, -1), tokenizer, TEXTS, context=8, baseline=uniform)
    expected = -math.log(VOCABULARY) - logits.log_softmax(0).mean().item()
    assert score["kl_divergence"] == pytest.approx(expected, rel=1e-5)
    assert score["kl_p99"] == pytest.approx(expected, rel=1e-5)


def test_the_standard_error_is_that_of_the_means_of_windows(tokenizer: Any) -> None:
    # The model differs from the uniform baseline by 0 or by a fixed divergence, window by window.
    bent = torch.arange(VOCABULARY, dtype=torch.float32)
    divergence = -math.log(VOCABULARY) - bent.log_softmax(0).mean().item()
    texts = {"halves": torch.tensor([0] * 16 + [1] * 16)}

    def model(ids: Tensor, /) -> Tensor:
        return ids[..., None] * bent

    (score,) = score_texts(model, tokenizer, texts, context=8, baseline=uniform)
    assert score["kl_divergence"] == pytest.approx(divergence / 2, rel=1e-5)
    assert score["kl_standard_error"] == pytest.approx(divergence / math.sqrt(4 * 3), rel=1e-5)


def test_a_single_window_has_no_standard_error(tokenizer: Any) -> None:
    (score,) = score_texts(bigram(0), tokenizer, TEXTS, context=8, baseline=bigram(1), limit=1)
    assert "kl_standard_error" not in score
    assert "kl_divergence" in score


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_do_not_depend_on_the_batch(tokenizer: Any, batch_size: int) -> None:
    arguments: dict[str, Any] = {"context": 8, "baseline": bigram(1)}
    (expected,) = score_texts(bigram(0), tokenizer, TEXTS, **arguments)
    (score,) = score_texts(bigram(0), tokenizer, TEXTS, batch_size=batch_size, **arguments)
    assert score == expected


def test_limit_counts_windows(tokenizer: Any) -> None:
    (score,) = score_texts(uniform, tokenizer, TEXTS, context=8, limit=3)
    assert score["tokens"] == 3 * 7


def test_progress_counts_the_windows_done(tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    score_texts(uniform, tokenizer, TEXTS, context=8, batch_size=4, progress=lambda *state: seen.append(state))
    assert seen == [("walk", 4, 9), ("walk", 8, 9), ("walk", 9, 9)]


def test_a_run_that_was_killed_goes_on_at_the_next_batch(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[int] = []

    def killed(ids: Tensor, /) -> Tensor:
        if len(rows) == 2:
            raise KeyboardInterrupt
        return counted(ids)

    def counted(ids: Tensor, /) -> Tensor:
        rows.append(len(ids))
        return bigram(0)(ids)

    arguments: dict[str, Any] = {"context": 8, "baseline": bigram(1), "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        score_texts(killed, tokenizer, TEXTS, journal=Journal(tmp_path / "journal"), **arguments)
    journal = Journal(tmp_path / "journal")
    assert score_texts(counted, tokenizer, TEXTS, journal=journal, **arguments) == score_texts(
        bigram(0), tokenizer, TEXTS, **arguments
    )
    assert rows == [2, 2, 2, 2, 1]
    assert (journal.asked, journal.found) == (9, 4)


def test_what_is_known_is_not_measured_again_whatever_the_batch_and_the_limit(tokenizer: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"context": 8, "journal": Journal(tmp_path / "journal")}
    (expected,) = score_texts(bigram(0), tokenizer, TEXTS, **arguments)

    def nothing(ids: Tensor, /) -> Tensor:
        raise AssertionError("measured")

    assert score_texts(nothing, tokenizer, TEXTS, batch_size=1, **arguments) == [expected]
    assert score_texts(nothing, tokenizer, TEXTS, limit=3, **arguments)[0]["tokens"] == 21


def test_a_damaged_measurement_is_made_again(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    expected = score_texts(bigram(0), tokenizer, TEXTS, context=8, journal=Journal(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    journal = Journal(path)
    assert score_texts(bigram(0), tokenizer, TEXTS, context=8, journal=journal) == expected
    assert (journal.asked, journal.found) == (9, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_refused(tokenizer: Any, bad: float) -> None:
    def model(ids: Tensor, /) -> Tensor:
        return uniform(ids).index_fill(-1, torch.tensor(3), bad)

    with pytest.raises(ScoreError, match=r"walk: the baseline returned logits .* not finite"):
        score_texts(uniform, tokenizer, TEXTS, context=8, baseline=model)


def test_models_of_different_vocabularies_are_not_compared(tokenizer: Any) -> None:
    with pytest.raises(ScoreError, match="a vocabulary of 11 and the baseline one of 22"):
        score_texts(uniform, tokenizer, TEXTS, context=8, baseline=lambda ids: uniform(ids).repeat(1, 1, 2))


def test_logits_for_other_positions_than_the_ids_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ScoreError, match=r"shape \[9, 1, 11\] for ids of shape \[9, 8\]"):
        score_texts(lambda ids: uniform(ids)[:, -1:], tokenizer, TEXTS, context=8)


def test_a_loss_beyond_any_perplexity_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ScoreError, match="nats per token: its weights are damaged"):
        score_texts(
            lambda ids: 1e5 * torch.nn.functional.one_hot(ids, VOCABULARY).float(),
            tokenizer,
            {"count": torch.arange(VOCABULARY)},
            context=8,
        )


@pytest.mark.parametrize("argument", ["limit", "batch_size"])
def test_zero_windows_are_refused(tokenizer: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0"):
        score_texts(uniform, tokenizer, TEXTS, context=8, **{argument: 0})


def test_a_bare_function_needs_a_context(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="pass context"):
        score_texts(uniform, tokenizer, TEXTS)


def test_the_default_context_is_the_models_up_to_2048() -> None:
    assert default_context(LlamaConfig(max_position_embeddings=512)) == 512
    assert default_context(LlamaConfig(max_position_embeddings=131072)) == 2048
    assert default_context(GPT2Config(n_positions=1024)) == 1024


def test_a_batch_stays_under_64_megabytes_of_logits() -> None:
    assert default_batch_size(context=512, vocabulary=512) == 16
    assert default_batch_size(context=512, vocabulary=8192) == 4
    assert default_batch_size(context=2048, vocabulary=8192) == 1
    assert default_batch_size(context=2048, vocabulary=128_256) == 1


def test_a_batch_is_measured_by_the_models_vocabulary_not_the_tokenizers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are often padded far beyond the tokenizer, and the logits are as wide as they."""

    class Padded:
        config = LlamaConfig(vocab_size=4 * len(tokenizer), max_position_embeddings=8)

        def __call__(self, input_ids: Tensor) -> Tensor:
            rows.append(len(input_ids))
            return torch.zeros(*input_ids.shape, self.config.vocab_size)

    rows: list[int] = []
    monkeypatch.setattr(evaluate, "BATCH_BYTES", 4 * 8 * 4 * len(tokenizer) * 2)
    score_texts(Padded(), tokenizer, TEXTS, limit=4)
    assert max(rows) == 2


@pytest.fixture(scope="module")
def stories(assets: Path) -> tuple[Any, Any]:
    folder = assets / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def test_a_real_models_perplexity_is_the_one_transformers_computes(stories: Any, assets: Path) -> None:
    model, tokenizer = stories
    path = assets / "data/validation.jsonl"
    (score,) = score_texts(logits_of(model), tokenizer, [path], limit=3)
    rows = windows(tokenize(read_documents(path, tokenizer), tokenizer), 512, tokenizer.bos_token_id)[:3]
    with torch.no_grad():
        expected = model(input_ids=rows, labels=rows).loss.exp().item()
    assert (score["name"], score["tokens"], score["context"]) == ("validation.jsonl", 3 * 511, 512)
    assert score["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_real_model_in_training_mode_is_refused(stories: Any) -> None:
    model, _ = stories
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            logits_of(model)
    finally:
        model.eval()


def test_files_of_one_name_are_told_apart_by_path(tokenizer: Any, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one/test.txt", "two/test.txt", "two/other.txt")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("1 2 3")
    scores = score_texts(uniform, tokenizer, paths, context=8)
    assert [score["name"] for score in scores] == [str(paths[0]), str(paths[1]), "other.txt"]
