"""Perplexity of a model on texts, and its distance from a baseline on the same tokens.

Perplexity is exp of the mean negative log-likelihood per predicted token, over the windows of `eval.texts`.
With a baseline, each batch of windows passes through both models and is reduced to a few numbers per token at
once, so logits are never kept. The two losses are paired token by token: the ratio of the perplexities is exp
of a mean *difference*, and far better known than either perplexity. Standard errors treat windows as the
independent samples, since the tokens of one window are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from eval.divergence import kl_divergence, token_losses, top1_agreement
from eval.journal import Journal, digest, packed, unpacked
from eval.texts import prepended_bos, read_streams, windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_CONTEXT = 2048
BATCH_BYTES = 64 << 20
"""What the float32 logits of one batch may take; a model streamed from disk is read once per batch."""
MAX_BATCH = 16

Progress = Callable[[str, int, int], None]
"""Called after each batch with the text's name, the windows done, and the windows there are."""


class ScoreError(RuntimeError):
    """A model ran, and what it returned cannot be scored."""


class LogitsModel(Protocol):
    """Anything that maps token ids [b, context] to logits [b, context, vocabulary]."""

    def __call__(self, input_ids: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """One text's numbers. Those from `kl_divergence` on need a baseline, standard errors two windows."""

    name: str
    perplexity: float
    tokens: int
    """Tokens predicted: all of every window but its first."""
    context: int
    """Tokens in a window, a BOS included."""
    kl_divergence: float | None = None
    """Mean over tokens of KL(baseline ‖ model), in nats."""
    top1_agreement: float | None = None
    """Share of predictions where both models put the same token first."""
    perplexity_ratio: float | None = None
    """Perplexity over the baseline's: 1 is no loss."""
    baseline_perplexity: float | None = None
    kl_p99: float | None = None
    """The divergence that 99 % of the tokens do not exceed."""
    kl_standard_error: float | None = None
    perplexity_ratio_standard_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The numbers there are, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Transformer:
    """A transformers model as a `LogitsModel`."""

    model: PreTrainedModel

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, /) -> Tensor:
        return self.model(input_ids=input_ids.to(self.model.device), use_cache=False).logits


def logits_of(model: PreTrainedModel) -> LogitsModel:
    """A causal transformers model as the function from ids to logits that `score_texts` takes.

    Raises ValueError for a model in training mode, whose dropout would be scored too.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout is active; call model.eval() first")
    return _Transformer(model)


def default_context(config: PreTrainedConfig) -> int:
    """The smaller of 2048 and the longest input the model was made for; 2048 where its config names none."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        longest = getattr(text_config, name, None)
        if longest:
            return min(DEFAULT_CONTEXT, longest)
    return DEFAULT_CONTEXT


def default_batch_size(context: int, vocabulary: int) -> int:
    """The windows whose float32 logits stay under 64 MB: at least one, at most 16."""
    return max(1, min(MAX_BATCH, BATCH_BYTES // (4 * context * vocabulary)))


def score_texts(
    model: LogitsModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Path] | Mapping[str, Tensor],
    *,
    baseline: LogitsModel | None = None,
    context: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The `Score` of each text as a dict: files, or token streams [tokens] by name.

    `limit` is the most windows scored per text. `context` may be left out for models that carry a `config`. `journal`,
    that of this model and baseline, keeps what is measured of each window, and what it has is not measured again.
    All texts are read before the first is scored. Raises TextError, ScoreError, and ValueError for arguments
    that make no sense.
    """
    for argument, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}={value} scores nothing; use 1 or more")
    if context is None:
        context = min(_context_of(each) for each in (model, baseline) if each is not None)
    batch_size = batch_size or default_batch_size(context, max(len(tokenizer), _vocabulary_of(model)))
    bos = prepended_bos(tokenizer)
    streams = texts if isinstance(texts, Mapping) else read_streams(texts, tokenizer)
    cut = {name: windows(tokens, context, bos)[:limit] for name, tokens in streams.items()}
    return [
        score_windows(name, model, rows, baseline, batch_size, progress, journal).as_dict()
        for name, rows in cut.items()
    ]


def _vocabulary_of(model: LogitsModel) -> int:
    """The width of the logits, which may be larger than the tokenizer's vocabulary; 0 for a model without a config."""
    config = getattr(model, "config", None)
    return 0 if config is None else config.get_text_config().vocab_size


def score_windows(
    name: str,
    model: LogitsModel,
    rows: Tensor,
    baseline: LogitsModel | None,
    batch_size: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Score:
    """Scores windows [n, context] of one text, `batch_size` at a time of those that `journal` does not know."""

    def measure(unknown: list[int]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(unknown), batch_size):
            batch = unknown[start : start + batch_size]
            found = _measure(name, model, baseline, rows[batch])
            yield from (packed({key: values[place] for key, values in found.items()}) for place in range(len(batch)))
            if progress is not None:
                progress(name, len(rows) - len(unknown) + start + len(batch), len(rows))

    kept = (journal or Journal()).fill([digest(row.numpy().tobytes()) for row in rows], measure)
    measured = [unpacked(window) for window in kept]
    by_measure = {key: torch.stack([window[key] for window in measured]).double() for key in measured[0]}
    return _summarize(name, rows.shape[1], by_measure)


def _measure(name: str, model: LogitsModel, baseline: LogitsModel | None, rows: Tensor) -> dict[str, Tensor]:
    """Everything scored about each predicted token, [b, context - 1] by measure."""
    logits = _logits(f"{name}: the model", model, rows)
    tokens = rows.to(logits.device)
    measured = {"loss": token_losses(logits, tokens)}
    if baseline is not None:
        base_logits = _logits(f"{name}: the baseline", baseline, rows).to(logits.device)
        if base_logits.shape != logits.shape:
            raise ScoreError(
                f"{name}: the model has a vocabulary of {logits.shape[-1]} and the baseline one of "
                f"{base_logits.shape[-1]}; compare models that share one"
            )
        measured["base_loss"] = token_losses(base_logits, tokens)
        measured["kl"] = kl_divergence(base_logits, logits)
        measured["agreement"] = top1_agreement(base_logits, logits)
    return {key: values.cpu() for key, values in measured.items()}


def _logits(who: str, model: LogitsModel, rows: Tensor) -> Tensor:
    logits = model(rows)
    if logits.ndim != 3 or logits.shape[:2] != rows.shape:
        raise ScoreError(
            f"{who} returned logits of shape {list(logits.shape)} for ids of shape {list(rows.shape)}; "
            "expected [batch, context, vocabulary]"
        )
    lowest, highest = (value.item() for value in logits.aminmax())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ScoreError(
            f"{who} returned logits from {lowest} to {highest}: they are not finite numbers. "
            "Look for overflow (try float32) or damaged weights"
        )
    return logits


def _summarize(name: str, context: int, by_measure: Mapping[str, Tensor]) -> Score:
    loss = by_measure["loss"]
    perplexity = _exp(f"{name}: the model", loss.mean().item())
    if "kl" not in by_measure:
        return Score(name, perplexity, loss.numel(), context)
    base_loss, kl = by_measure["base_loss"], by_measure["kl"]
    excess = loss - base_loss
    ratio = _exp(f"{name}: the model, over the baseline,", excess.mean().item())
    excess_error = _standard_error(excess)
    return Score(
        name,
        perplexity,
        loss.numel(),
        context,
        kl_divergence=kl.mean().item(),
        top1_agreement=by_measure["agreement"].mean().item(),
        perplexity_ratio=ratio,
        baseline_perplexity=_exp(f"{name}: the baseline", base_loss.mean().item()),
        kl_p99=kl.flatten().kthvalue(math.ceil(0.99 * kl.numel())).values.item(),
        kl_standard_error=_standard_error(kl),
        perplexity_ratio_standard_error=None if excess_error is None else ratio * excess_error,
    )


def _standard_error(values: Tensor) -> float | None:
    """Of the mean of [n, predictions], with windows as samples; None for a single window."""
    means = values.mean(dim=1)
    return means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None


def _exp(who: str, loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise ScoreError(f"{who} loses {loss:.0f} nats per token: its weights are damaged") from error


def _context_of(model: LogitsModel) -> int:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError("context: a model without 'config' does not say how long its input may be; pass context")
    return default_context(config)
