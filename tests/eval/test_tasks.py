"""lm-eval's results in our words, and a sentence where it is absent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from eval.tasks import TaskError, metrics, run_tasks


def test_metrics_lose_the_filter_that_filters_nothing() -> None:
    result = {
        "alias": "arc_easy",
        "sample_len": 100,
        "acc,none": 0.5,
        "acc_stderr,none": 0.05,
        "acc_norm,none": 0.4,
        "acc_norm_stderr,none": 0.04,
    }
    assert metrics(result) == {
        "acc": 0.5,
        "acc_stderr": 0.05,
        "acc_norm": 0.4,
        "acc_norm_stderr": 0.04,
        "stderr": 0.05,
    }


def test_metrics_of_a_real_filter_keep_its_name() -> None:
    result = {"exact_match,strict-match": 0.2, "exact_match_stderr,strict-match": "N/A"}
    assert metrics(result) == {"exact_match,strict-match": 0.2}


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model: Any = None
    with pytest.raises(TaskError, match=r"pip install 'netsuke\[tasks\]'"):
        run_tasks(model, None, ["arc_easy"])


def test_a_local_task_is_scored(assets: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install netsuke[tasks]")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models/stories260k"
    task = {
        "task": "principle_a",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(assets / "data/blimp/principle_A_case_1.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = run_tasks(model, tokenizer, [task], limit=20)
    assert scores["principle_a"]["acc"] > 0.9
    assert scores["principle_a"]["stderr"] == scores["principle_a"]["acc_stderr"] < 0.1


def test_an_unknown_task_is_named() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install netsuke[tasks]")
    model: Any = None
    with pytest.raises(TaskError, match="no task nonesuch"):
        run_tasks(model, None, ["arc_easy", "blimp", "nonesuch"])
