"""Question-answering and other tasks, run by EleutherAI's lm-eval (`pip install netsuke[tasks]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.evaluate import default_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 8
BOOTSTRAP_ITERATIONS = 1000
"""For the standard error of metrics that are not means; lm-eval's default is a hundred times as many."""


class TaskError(ValueError):
    """lm-eval is not installed, or does not know a task."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores by task name: every metric, its `<metric>_stderr`, and as `stderr` that of the first metric.

    A task is a name lm-eval knows, the path of a task's YAML, or such a YAML as a dict; `limit` is the most
    questions asked per task. lm-eval draws its progress on stderr. Raises TaskError.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(f"tasks need lm-eval ({error}); pip install 'netsuke[tasks]'") from error

    manager = TaskManager()
    names = [task for task in tasks if isinstance(task, str)]
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise TaskError(f"lm-eval has no task {', '.join(unknown)}; see the list with: lm_eval ls tasks")
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=BATCH_SIZE,
        max_length=default_context(model.config),
        device=str(model.device),
    )
    answers = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        log_samples=False,
        task_manager=manager,
    )
    return {name: metrics(result) for name, result in answers["results"].items()}


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in lm-eval's result of one task, whose keys are `metric,filter`, by plain metric name."""
    values = {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }
    errors = [value for key, value in values.items() if "_stderr" in key]
    return {**values, "stderr": errors[0]} if errors else values
