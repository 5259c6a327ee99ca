"""A transformers model as lm-eval asks it: with its past in its own cache, and never asked the same thing twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from eval.decode_path import DecodePath, cache_argument
from eval.evaluate import default_context
from eval.journal import Journal, digest

BATCH_SIZE = 8


class Respondent(HFLM):
    """lm-eval's own wrapper of a model, with two changes.

    `new_cache` makes an empty cache, such as a quantized one, which a forward pass over the whole prompt would pass by.
    `journal` keeps each answer as it comes; one that is there already is given from it. `progress` is called with the
    answers there are and those that are wanted, of one kind of question after the other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        new_cache: Callable[[], Any] | None = None,
        journal: Journal | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=getattr(model, "batch_size", BATCH_SIZE),
            max_length=default_context(model.config),
            device=str(model.device),
        )
        self.new_cache = new_cache
        self.journal = journal or Journal()
        self.asking = _identity(tokenizer)
        self.progress = progress
        self.done = self.wanted = 0
        self.set_cache_hook(self)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return [tuple(answer) for answer in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answers("generate_until", requests)

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """What lm-eval's wrapper calls with every answer, as soon as it has it."""
        if not _is_drawn(arguments):
            self.journal.put(self._key(kind, arguments), answer)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.wanted)

    def _key(self, kind: str, arguments: Sequence[Any]) -> str:
        return digest(self.asking, kind, json.dumps([*arguments], sort_keys=True))

    def _answers(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        keys = [None if _is_drawn(request.args) else self._key(kind, request.args) for request in requests]
        known = [None if key is None else self.journal.get(key) for key in keys]
        unknown = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        self.done, self.wanted = len(requests) - len(unknown), len(requests)
        found = iter(getattr(super(), kind)(unknown, disable_tqdm=True) if unknown else ())
        return [next(found) if answer is None else answer for answer in known]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self.new_cache is None:
            return super()._model_call(inps, attn_mask, labels)
        return DecodePath(self.model, self.new_cache, step=None)(inps)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self.new_cache is not None:
            options[cache_argument(self.model)] = self.new_cache()
        return super()._model_generate(context, max_length, stop, **options)


def _identity(tokenizer: Any) -> str:
    """Of what stands between the words of a question and what the model is asked."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer("a").input_ids]
    backend = getattr(tokenizer, "backend_tokenizer", None)  # which the line above has rid of an earlier call's padding
    return digest(backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True), json.dumps(ids))


def _is_drawn(arguments: Sequence[Any]) -> bool:
    """Whether an answer is drawn at random, so that another time it would be another one."""
    return any(isinstance(each, dict) and each.get("do_sample") for each in arguments)
