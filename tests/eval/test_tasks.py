"""lm-eval's results in our words, question by question, and a sentence where something is wrong with a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.answers import scores
from eval.journal import Journal
from eval.tasks import TaskError, load_tasks, metrics, run_tasks

PAIRS = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
"""Two sentences, of which the first shall be the more probable one."""
WRITTEN = {
    "task": "written",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text[:40]}}",
    "doc_to_target": "{{text[40:]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
DOCUMENTS = {
    "task": "documents",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}


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


def test_without_lm_eval_the_error_says_how_to_install_it(without: Callable[[str], None]) -> None:
    without("lm_eval")
    with pytest.raises(TaskError, match=r"pip install 'netsuke\[tasks\]'"):
        load_tasks(["arc_easy"])


# ---- with lm-eval ----------------------------------------------------------------------------------------


def blimp(file: Path, **others: Any) -> dict[str, Any]:
    return {"task": file.stem, "dataset_kwargs": {"data_files": {"test": str(file)}}, **others}


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="needs lm-eval: pip install netsuke[tasks]")


@pytest.fixture(scope="module")
def stories(assets: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models/stories260k"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pairs(assets: Path) -> dict[str, Any]:
    return PAIRS | blimp(assets / "data/blimp/npi_present_1.jsonl")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, lm_eval: Any) -> list[int]:
    """The number of sequences in each batch that a model sees."""
    from eval.respondent import Respondent

    seen: list[int] = []
    ask = Respondent._model_call

    def call(self: Any, inps: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(len(inps))
        return ask(self, inps, *others)

    monkeypatch.setattr(Respondent, "_model_call", call)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260k", "pocket-llama-13m"])
def test_a_group_in_a_file_gives_the_accuracies_that_its_models_came_with(
    lm_eval: Any, assets: Path, tmp_path: Path, name: str
) -> None:
    """Two of the twelve paradigms in the README of the assets, by another program, and to the last of 200 pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = ("anaphor_gender_agreement", "npi_present_1")
    files = [assets / f"data/blimp/{paradigm}.jsonl" for paradigm in chosen]
    group = {**PAIRS, "group": "blimp", "aggregate_metric_list": [{"metric": "acc"}], "task": [*map(blimp, files)]}
    (tmp_path / "blimp.yaml").write_text(yaml.safe_dump(group))
    folder = assets / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = run_tasks(model, AutoTokenizer.from_pretrained(folder), load_tasks([str(tmp_path / "blimp.yaml")]))
    known = json.loads((folder / "evaluation.json").read_text())["blimp"]
    assert {paradigm: answers[f"blimp::{paradigm}"].metrics["acc"] for paradigm in chosen} == {
        paradigm: pytest.approx(known[paradigm]) for paradigm in chosen
    }
    assert answers["blimp"].metrics["acc"] == pytest.approx(sum(known[paradigm] for paradigm in chosen) / 2)
    assert answers["blimp"].parts == tuple(f"blimp::{paradigm}" for paradigm in chosen)


def test_answers_are_kept_by_question(lm_eval: Any, stories: Any, pairs: dict[str, Any]) -> None:
    answered = run_tasks(*stories, load_tasks([pairs]), limit=20)["npi_present_1"]
    assert sorted(answered.questions) == sorted(answered.values["acc"]) == list(range(20))
    assert len(set(answered.questions.values())) == 20
    assert sum(answered.values["acc"].values()) / 20 == answered.metrics["acc"]
    assert answered.metrics["stderr"] == answered.metrics["acc_stderr"] > 0


def test_a_model_beside_itself_differs_by_nothing(lm_eval: Any, stories: Any, pairs: dict[str, Any]) -> None:
    tasks = load_tasks([pairs])
    found = scores(run_tasks(*stories, tasks, limit=10), run_tasks(*stories, tasks, limit=10))["npi_present_1"]
    assert (found["acc_difference"], found["acc_difference_stderr"], found["flips"], found["questions"]) == (
        0,
        0,
        0,
        10,
    )


def test_a_model_beside_another_flips_some_answers(lm_eval: Any, stories: Any, pairs: dict[str, Any]) -> None:
    tasks = load_tasks([pairs])
    noisy, generator = deepcopy(stories[0]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in noisy.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    found = scores(run_tasks(noisy, stories[1], tasks, limit=40), run_tasks(*stories, tasks, limit=40))["npi_present_1"]
    gained = found["flips"] - found["flips_to_wrong"]
    assert 0 < found["flips"] < 20
    assert found["acc_difference"] == pytest.approx((gained - found["flips_to_wrong"]) / 40)
    assert 0 < found["acc_difference_stderr"] < found["acc_difference_stderr_unpaired"]


def test_what_was_answered_is_not_asked_again(
    lm_eval: Any, stories: Any, pairs: dict[str, Any], tmp_path: Path, counted: list[int]
) -> None:
    tasks = load_tasks([pairs])
    first = run_tasks(*stories, tasks, limit=10, journal=Journal(tmp_path / "journal"))
    assert sum(counted) == 20
    counted.clear()
    journal = Journal(tmp_path / "journal")
    assert run_tasks(*stories, tasks, limit=10, journal=journal) == first
    assert counted == []
    assert (journal.asked, journal.found) == (20, 20)
    assert run_tasks(*stories, tasks, limit=12, journal=journal)["npi_present_1"].questions.keys() == set(range(12))
    assert sum(counted) == 4


def test_a_run_that_was_killed_goes_on_where_it_was(
    lm_eval: Any,
    stories: Any,
    pairs: dict[str, Any],
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from eval.respondent import BATCH_SIZE, Respondent

    tasks = load_tasks([pairs])
    ask = Respondent._model_call

    def killed(self: Any, inps: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(counted) == 2:
            raise KeyboardInterrupt
        return ask(self, inps, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Respondent, "_model_call", killed)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(*stories, tasks, limit=20, journal=Journal(tmp_path / "journal"))
    assert counted == [BATCH_SIZE] * 2
    counted.clear()
    resumed = run_tasks(*stories, tasks, limit=20, journal=Journal(tmp_path / "journal"))
    assert sum(counted) == 40 - 2 * BATCH_SIZE
    assert resumed == run_tasks(*stories, tasks, limit=20)


@pytest.mark.parametrize("task", [WRITTEN, DOCUMENTS])
def test_texts_that_are_written_or_scored_whole_are_kept_too(
    lm_eval: Any, stories: Any, tmp_path: Path, task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = [
        "Once upon a time, there was a little girl named Lily.",
        "She loved to play outside in the park. One day",
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    tasks = load_tasks([{**task, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "x.jsonl")}}}])
    first = run_tasks(*stories, tasks, journal=Journal(tmp_path / "journal"))
    journal = Journal(tmp_path / "journal")
    assert run_tasks(*stories, tasks, journal=journal) == first
    assert (journal.asked, journal.found) == (2, 2)
    assert capsys.readouterr().out == ""


def test_a_perplexity_over_documents_is_that_of_their_tokens_after_the_bos(
    lm_eval: Any, stories: Any, tmp_path: Path
) -> None:
    model, tokenizer = stories
    text = "Once upon a time, there was a little girl named Lily."
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
    tasks = load_tasks([{**DOCUMENTS, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "x.jsonl")}}}])
    found = run_tasks(model, tokenizer, tasks)["documents"].metrics
    ids = tokenizer(text, return_tensors="pt").input_ids
    twice = torch.cat([ids[:, :1], ids], dim=1)  # lm-eval predicts the BOS too, from another one before it
    with torch.no_grad():
        loss = model(input_ids=twice, labels=twice).loss.item() * (twice.shape[1] - 1)
    assert found["word_perplexity"] == pytest.approx(torch.tensor(loss / len(text.split())).exp().item(), rel=1e-4)


def test_a_model_is_asked_with_its_own_cache(lm_eval: Any, stories: Any, pairs: dict[str, Any]) -> None:
    from transformers import DynamicCache

    class Lossy(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values * 0 if lossy else values

    lossy = False
    model, tokenizer = stories
    tasks = load_tasks([pairs])

    def answers(new_cache: Callable[[], Any] | None) -> list[float]:
        journal = Journal()
        kept: list[float] = []
        journal.put = lambda key, value: kept.append(value[0])  # type: ignore[method-assign]
        run_tasks(model, tokenizer, tasks, limit=4, new_cache=new_cache, journal=journal)
        return kept

    exact = answers(None)
    assert answers(lambda: Lossy(config=model.config)) == pytest.approx(exact, rel=1e-4)
    lossy = True
    assert answers(lambda: Lossy(config=model.config)) != pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("task: [unclosed", "lm-eval cannot load it"),
        ("dataset_path: json", "it is no YAML with a `task` or a `group`"),
        ("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}",
         "nowhere.jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_describes_no_task_is_refused_by_name(
    lm_eval: Any, tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(TaskError, match=rf"mine\.yaml: .*{says}"):
        load_tasks([str(tmp_path / "mine.yaml")])


@pytest.mark.slow
def test_an_unknown_task_is_named(lm_eval: Any) -> None:
    with pytest.raises(TaskError, match="no task nonesuch, and there is no such file"):
        load_tasks(["arc_easy", "blimp", "nonesuch"])
