"""Scoring of models, alone or against a baseline: on texts, on tasks, and by what they write.

For texts, whose windows are few and long, both models are streamed from their files, side by side. For tasks, and to
write, one after the other is in memory. What was measured before is not measured again (`compress.scoring.cache`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import NumericalError, RequestError, eval_package
from compress.models.store import give_back
from compress.scoring.asked import Asked, read_asked
from compress.scoring.cache import ScoreCache
from compress.scoring.gguf import place_of
from compress.scoring.opened import context_of, opened, resident, tokenizer_of
from compress.scoring.vocabulary import Vocabulary, problems, vocabulary_of, width_of, words_of

Progress = Callable[[str, float, str], None]
"""Called with the phase, the share of the whole that is done (0…1), and a few words."""


def score_streams(
    model: Path,
    baseline: Path | None,
    tokenizer: Any,
    texts: Mapping[str, Tensor],
    *,
    context: int,
    limit: int | None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Score token streams by name; with a baseline, both models see the same tokens."""
    folders = [model, baseline] if baseline else [model]
    return _streamed(folders, Asked(tokenizer, context, limit, texts), ScoreCache(None), progress, device)[0]


def score(
    model: str,
    *,
    baseline: str | None = None,
    texts: Sequence[Path] = (),
    tasks: Sequence[str] = (),
    context: int | None = None,
    limit: int | None = None,
    new_tokens: int | None = None,
    prompts: Path | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `netsuke eval` prints of one folder or hub id, against a baseline where one is given.

    `new_tokens` are written after each document of the file `prompts`, or after the beginnings of the texts' windows.
    Measurements are kept in the folder `cache` and found there; None: they are not kept.
    """
    folders = [place_of(name) for name in (model, baseline) if name]
    _check(texts, tasks, context, limit, new_tokens)
    tokenizer = tokenizer_of(*folders)
    width = _shared(folders, tokenizer)
    asked = read_asked(
        tokenizer,
        context or min(map(context_of, folders)),
        limit,
        vocabulary=width,
        texts=texts,
        tasks=tasks,
        new_tokens=new_tokens,
        prompts=prompts,
    )
    kept = ScoreCache(cache, lambda file: _say(progress, "hash", 0.0, file.name))
    with eval_package():
        from eval.answers import scores
        from eval.generation import summary
    scored, found = _streamed(folders, asked, kept, progress)
    answers, written = zip(*(_resident(folder, asked, kept, progress) for folder in folders), strict=True)
    with _sentences():
        told = scores(*({**one, **other} for one, other in zip(found, answers, strict=True)))
    result = {"model": model, "baseline": baseline, "texts": scored, "tasks": told}
    if asked.prompts:
        decode = partial(asked.tokenizer.decode, skip_special_tokens=True)
        result["generation"] = summary(asked.prompts, asked.new_tokens, decode, *written)
    return result | {"cache": kept.summary()}


def _check(
    texts: Sequence[Path],
    tasks: Sequence[str],
    context: int | None,
    limit: int | None,
    new_tokens: int | None,
) -> None:
    """Raises RequestError where the numbers make no sense, or nothing is asked."""
    if not texts and not tasks and new_tokens is None:
        raise RequestError("nothing to score: give --text FILE, --tasks a,b or --generate N")
    for option, value, least in (("--context", context, 2), ("--limit", limit, 1), ("--generate", new_tokens, 1)):
        if value is not None and value < least:
            raise RequestError(f"{option} {value}: must be at least {least}")


def _shared(folders: Sequence[Path], tokenizer: Any) -> int:
    """The width of the vocabulary that models share with each other, and with the tokenizer that asks them.

    Raises RequestError where they do not.
    """
    vocabularies = {str(folder): vocabulary_of(folder) for folder in folders}
    if told := problems(vocabularies):
        raise RequestError(told)
    name, first = next(iter(vocabularies.items()))
    asking, place = Vocabulary(first.width, words_of(tokenizer)), tokenizer.name_or_path
    if asking.unlike(place, first, name):  # which only that beside a GGUF file can be
        raise RequestError(f"{place}: the tokenizer there is not that of {name}. Put the model's own in its place")
    return first.width


def _streamed(
    folders: Sequence[Path], asked: Asked, kept: ScoreCache, progress: Progress | None, device: str = "cpu"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores of the texts, and the answers of each model to what is asked for logits alone."""
    with eval_package():
        from eval.evaluate import default_batch_size, score_texts
        from eval.retrieval import answers
    if not asked.streams and not asked.retrieved:
        return [], [{} for _ in folders]

    def tell(name: str, done: int, total: int) -> None:
        _say(progress, "score", done / total, f"{name}: {done} of {total} windows")

    _let_go()
    with ExitStack() as stack, _sentences():
        models = [stack.enter_context(opened(folder, device)) for folder in folders]
        scored = score_texts(
            models[0],
            asked.tokenizer,
            asked.streams,
            baseline=models[1] if len(models) > 1 else None,
            context=asked.context,
            limit=asked.limit,
            batch_size=default_batch_size(asked.context, width_of(folders[0])),
            journal=kept.journal("windows", *folders) if asked.streams else None,
            progress=tell,
        )
        found = [
            answers(model, asked.retrieved, kept.journal("samples", folder) if asked.retrieved else None)
            for model, folder in zip(models, folders, strict=True)
        ]
    return scored, found


def _resident(
    folder: Path, asked: Asked, kept: ScoreCache, progress: Progress | None
) -> tuple[dict[str, Any], list[list[int]]]:
    """One model's answers to the tasks of lm-eval, and what it writes."""
    with eval_package():
        from eval.generation import written
        from eval.tasks import run_tasks
    answers: dict[str, Any] = {}
    texts: list[list[int]] = []
    if not asked.tasks and not asked.prompts:
        return answers, texts

    def tell(done: int, total: int) -> None:
        _say(progress, "tasks", done / total, f"{folder.name}: {done} of {total} answers")

    def write(prompt: list[int]) -> list[int]:
        _say(progress, "write", 0.0, folder.name)
        return model.write(prompt, asked.new_tokens)

    _let_go()
    model = resident(folder)
    with _sentences():
        if asked.tasks:
            answers = run_tasks(
                model,
                asked.tokenizer,
                asked.tasks,
                asked.limit,
                new_cache=model.new_cache,
                journal=kept.journal("answers", folder),
                progress=tell,
            )
        if asked.prompts:
            texts = written(write, asked.prompts, asked.new_tokens, kept.journal("continuations", folder))
    return answers, texts


def _let_go() -> None:
    """Models that were scored leave memory before the next one enters it: some refer to themselves, as lm-eval does."""
    gc.collect()
    give_back()


def _say(progress: Progress | None, phase: str, done: float, words: str) -> None:
    if progress:
        progress(phase, done, words)


@contextmanager
def _sentences() -> Iterator[None]:
    """What goes wrong in eval, as an error of ours."""
    with eval_package():
        from eval.evaluate import ScoreError
        from eval.tasks import TaskError
    try:
        yield
    except ScoreError as error:
        raise NumericalError(str(error)) from error
    except TaskError as error:
        raise RequestError(str(error)) from error
