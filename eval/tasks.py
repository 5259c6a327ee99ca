"""Question answering and other tasks, asked by EleutherAI's lm-eval in this process (`pip install netsuke[tasks]`).

lm-eval knows tasks, prompts and metrics. Its results are kept by question here, so that those of another model can be
set against them (`eval.answers`).
"""

from __future__ import annotations

import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tqdm import tqdm

from eval.answers import Answers
from eval.journal import Journal, digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP_ITERATIONS = 1000
"""For the standard error of metrics that are not means; lm-eval's default is a hundred times as many."""
MISTAKES = (AssertionError, AttributeError, ImportError, LookupError, OSError, TemplateError, TypeError, ValueError)
"""What comes out of lm-eval where a task's description, its data or its fit to the model is wrong."""


class TaskError(ValueError):
    """lm-eval is not installed, or cannot ask a task."""


def load_tasks(tasks: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's objects of tasks and groups, their data loaded.

    A task is a name lm-eval knows, the path of a YAML file that describes a task or a group, or a task's description as
    a dict. Raises TaskError.
    """
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise TaskError(f"tasks need lm-eval ({error}); pip install 'netsuke[tasks]'") from error
        names = [task for task in tasks if isinstance(task, str) and not Path(task).is_file()]
        listed = TaskManager(include_defaults=bool(names))  # to list the thousands that lm-eval has takes seconds
        if unknown := [name for name in names if name not in listed.all_tasks]:
            raise TaskError(
                f"lm-eval has no task {', '.join(unknown)}, and there is no such file; see its list: lm_eval ls tasks"
            )
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
        for task in tasks:
            try:
                is_file = isinstance(task, str) and task not in names
                found = _read(Path(str(task)), TaskManager) if is_file else listed.load([task])
            except MISTAKES as error:
                raise TaskError(f"{task}: lm-eval cannot load it: {_reason(error)}") from error
            for kind, each in loaded.items():
                each |= found[kind]
    return loaded


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    limit: int | None = None,
    *,
    new_cache: Callable[[], Any] | None = None,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:
    """A model's answers by task, and what they come to by group.

    `tasks` are those of `load_tasks`; `limit` is the most questions asked of each. `new_cache`, `journal` and
    `progress` are those of `eval.respondent.Respondent`. Raises TaskError.
    """
    with _quiet():
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        from eval.respondent import Respondent

        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        try:
            results = evaluate(
                Respondent(model, tokenizer, new_cache, journal, progress),
                tasks,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
            )
        except MISTAKES as error:
            raise TaskError(f"lm-eval stopped at {_reason(error)}") from error
    samples, groups = results["samples"], results["group_subtasks"]
    answers = {
        name: _answers(result, samples.get(name, ()), tuple(groups.get(name, ())))
        for name, result in results["results"].items()
    }
    return {name: each for name, each in answers.items() if each.metrics}


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in lm-eval's result of one task, whose keys are `metric,filter`, by plain metric name."""
    values = {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }
    errors = [value for key, value in values.items() if "_stderr" in key]
    return {**values, "stderr": errors[0]} if errors else values


def _answers(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], parts: tuple[str, ...]) -> Answers:
    questions: dict[int, str] = {}
    values: dict[str, dict[int, float]] = {}
    for sample in samples:
        question = sample["doc_id"]
        questions[question] = digest(*(sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")))
        for metric in sample["metrics"]:
            key = f"{metric},{sample['filter']}".removesuffix(",none")
            if isinstance(sample[metric], int | float):
                values.setdefault(key, {})[question] = float(sample[metric])
    found = metrics(result)
    means = {
        metric: by_question
        for metric, by_question in values.items()
        if metric in found and math.isclose(sum(by_question.values()) / len(by_question), found[metric], abs_tol=1e-12)
    }
    return Answers(found, questions, means, parts)


def _read(file: Path, manager: Any) -> Any:
    """What a YAML file describes. lm-eval reads folders, so it is shown one with a link to this file alone."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "task.yaml").symlink_to(file.absolute())
        only = manager(include_path=folder, include_defaults=False)
        described = [*only.all_groups, *only.all_subtasks]
        if not described:
            raise ValueError("it is no YAML with a `task` or a `group`")
        return only.load(described)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints on stdout, warns of what cannot be changed here, and forks to draw a thousand samples; it shows a
    bar for each task and each of its files, where ours counts answers.

    Some of its tasks shuffle choices with Python's own generator, which it seeds.
    """
    log = logging.getLogger("lm_eval")
    level, state = log.level, random.getstate()
    log.setLevel(logging.ERROR)
    random.seed(0)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    bars = tqdm.__init__
    tqdm.__init__ = partialmethod(bars, disable=True)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = bars
        log.setLevel(level)
        random.setstate(state)


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
