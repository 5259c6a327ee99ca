"""What `netsuke eval` tells of a model and its baseline, and what it does not measure twice."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress.cli import main
from compress.models.store import load_tokenizer
from compress.scoring import score, score_streams
from compress.scoring.opened import resident

Eval = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in four bits, and a group of 32."""
    folder = tmp_path_factory.mktemp("small") / "out"
    options = ["--set", "rtn.group_size=32", "--set", "gates.max_perplexity_ratio=null"]
    assert main(["run", "w4a16-rtn", "--model", str(tiny), "--output", str(folder), *options]) == 0
    return folder


@pytest.fixture
def evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Eval:
    """`netsuke eval … --json` with a cache of this test's own."""

    def run(*arguments: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["eval", *map(str, arguments), "--cache", str(tmp_path / "cache"), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A task of lm-eval's in a file: which of two sentences is the more probable one?"""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install netsuke[tasks]")
    rows = [
        {"good": f"the carver keeps {number} things", "bad": f"keeps carver the things {number}"}
        for number in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "pairs.yaml"


def without_cache(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "cache"}


def test_a_second_run_measures_nothing_and_says_the_same(small: Path, tiny: Path, text: Path, evaluated: Eval) -> None:
    arguments = (small, "--baseline", tiny, "--text", text, "--limit", 6, "--tasks", "copy", "--generate", 8)
    first, second = evaluated(*arguments), evaluated(*arguments)
    assert without_cache(first) == without_cache(second)
    assert {kind: counts["found"] for kind, counts in first["cache"].items() if kind != "folder"} == {
        "windows": 0,
        "samples": 0,
        "continuations": 0,
    }
    assert {
        kind: (counts["found"], counts["asked"]) for kind, counts in second["cache"].items() if kind != "folder"
    } == {
        "windows": (6, 6),
        "samples": (36, 36),
        "continuations": (12, 12),
    }


def test_a_person_is_told_what_was_measured_before(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny), "--text", str(text), "--limit", "2", "--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    assert main(command) == 0
    assert capsys.readouterr().err.startswith("note: 2 of 2 windows were measured before")


def test_more_windows_of_the_same_text_cost_only_themselves(tiny: Path, text: Path, evaluated: Eval) -> None:
    evaluated(tiny, "--text", text, "--limit", 3)
    assert evaluated(tiny, "--text", text, "--limit", 5)["cache"]["windows"] == {"asked": 5, "found": 3}


def test_a_model_that_changed_is_measured_anew(tiny: Path, text: Path, tmp_path: Path, evaluated: Eval) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    before = evaluated(model, "--text", text, "--limit", 2)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = content[: len(content) // 2 + 1][: len(content) - len(content) // 2]
    file.write_bytes(content)
    after = evaluated(model, "--text", text, "--limit", 2)
    assert after["cache"]["windows"]["found"] == 0
    assert after["texts"] != before["texts"]


def test_a_damaged_cache_is_not_believed(tiny: Path, text: Path, tmp_path: Path, evaluated: Eval) -> None:
    before = evaluated(tiny, "--text", text, "--limit", 2)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes().replace(b"A", b"B"))
    after = evaluated(tiny, "--text", text, "--limit", 2)
    assert after["cache"]["windows"]["found"] == 0
    assert after["texts"] == before["texts"]


def test_without_a_cache_nothing_is_kept(
    tiny: Path, text: Path, caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(caches.rglob("*"))
    assert main(["eval", str(tiny), "--text", str(text), "--limit", "2", "--no-cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] is None
    assert sorted(caches.rglob("*")) == before


def test_by_default_scores_are_kept_in_the_users_caches(
    tiny: Path, text: Path, caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny), "--text", str(text), "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"]["folder"] == str(caches / "netsuke" / "scores")


def test_from_python_nothing_is_kept_unless_a_folder_is_named(tiny: Path, text: Path, caches: Path) -> None:
    assert score(str(tiny), texts=[text], limit=2)["cache"] is None


def test_streams_of_tokens_need_no_tokenizer_beside_the_model(tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, tmp_path)
    tokens = {"stream": torch.arange(2, 130)}
    (found,) = score_streams(tmp_path, tiny, load_tokenizer(tiny), tokens, context=16, limit=None)
    assert found["kl_divergence"] == 0


def test_a_task_is_asked_of_both_models_and_compared_by_question(
    small: Path, tiny: Path, pairs: Path, evaluated: Eval
) -> None:
    found = evaluated(small, "--baseline", tiny, "--tasks", pairs)["tasks"]["pairs"]
    assert set(found) == {
        *("acc", "acc_stderr", "stderr", "questions", "baseline_acc", "acc_difference", "acc_difference_stderr"),
        *("acc_difference_stderr_unpaired", "flips", "flips_to_wrong"),
    }
    assert found["questions"] == 12
    assert found["acc_difference"] == pytest.approx((found["flips"] - 2 * found["flips_to_wrong"]) / 12)
    again = evaluated(small, "--baseline", tiny, "--tasks", pairs)
    assert again["tasks"]["pairs"] == found
    assert again["cache"]["answers"] == {"asked": 48, "found": 48}


def test_a_checkpoint_that_quantizes_its_cache_answers_with_it(
    wide: Path, pairs: Path, tmp_path: Path, evaluated: Eval
) -> None:
    """A forward pass that reads no cache would give the answers of the original, to the last digit."""
    command = ["run", "kv8", "--model", str(wide), "--output", str(tmp_path / "kv8")]
    assert main([*command, "--set", "gates.max_perplexity_ratio=null"]) == 0
    evaluated(tmp_path / "kv8", "--baseline", wide, "--tasks", pairs)
    lines = [file.read_bytes().split(b"\n")[1:] for file in (tmp_path / "cache").glob("answers-*")]
    one, other = (dict(json.loads(line[33:]) for line in each) for each in lines)
    assert one.keys() == other.keys()
    assert all(one[key] != other[key] for key in one)
    assert [one[key][0] for key in one] == pytest.approx([other[key][0] for key in one], rel=0.05)


def test_a_model_has_left_memory_before_the_next_enters_it(
    small: Path, tiny: Path, pairs: Path, evaluated: Eval, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = sys.modules[score.__module__]
    entered: list[weakref.ref[Any]] = []
    in_memory: list[int] = []

    def enter(folder: Path) -> Any:
        in_memory.append(sum(model() is not None for model in entered))
        model = resident(folder)
        entered.append(weakref.ref(model))
        return model

    monkeypatch.setattr(scoring, "resident", enter)
    gc.disable()
    try:
        evaluated(small, "--baseline", tiny, "--tasks", pairs)
    finally:
        gc.enable()
    assert in_memory == [0, 0]


def test_what_both_write_is_set_side_by_side(small: Path, tiny: Path, text: Path, evaluated: Eval) -> None:
    found = evaluated(small, "--baseline", tiny, "--text", text, "--limit", 3, "--generate", 8)["generation"]
    assert (found["prompts"], found["new_tokens"], len(found["samples"])) == (3, 8, 3)
    for sample, point in zip(found["samples"], found["divergence_points"], strict=True):
        assert sample["divergence_point"] == point
        assert (sample["text"] == sample["baseline_text"]) or point is not None
    assert found["identical"] == found["divergence_points"].count(None) / 3
    itself = evaluated(tiny, "--baseline", tiny, "--text", text, "--limit", 3, "--generate", 8)["generation"]
    assert itself["identical"] == 1
    assert itself["repetition"] == itself["baseline_repetition"] == found["baseline_repetition"]


def test_prompts_may_come_from_a_file(tiny: Path, tmp_path: Path, evaluated: Eval) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "every detail"}\n{"text": "once"}\n')
    found = evaluated(tiny, "--generate", 4, "--prompt-file", tmp_path / "prompts.jsonl")
    assert [sample["prompt"] for sample in found["generation"]["samples"]] == ["every detail", "once"]
    assert found["texts"] == []


def test_a_gguf_file_is_scored_beside_the_folder_it_was_made_of(
    tiny: Path, text: Path, tmp_path: Path, evaluated: Eval
) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    file = tmp_path / "model.gguf"
    assert main(["convert", str(tiny), "--to", "gguf-f32", "--output", str(file)]) == 0
    told = evaluated(file, "--baseline", tiny, "--text", text, "--limit", 2, "--tasks", "copy")
    (beside,) = told["texts"]
    assert beside["kl_divergence"] < 1e-6
    assert beside["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert told["tasks"]["copy-63"]["flips" if "flips" in told["tasks"]["copy-63"] else "acc_difference"] == 0
    (alone,) = evaluated(file, "--text", text, "--limit", 2)["texts"]
    assert alone["perplexity"] == pytest.approx(beside["perplexity"])
    assert evaluated(file, "--text", text, "--limit", 2)["cache"]["windows"] == {"asked": 2, "found": 2}


def test_a_gguf_file_answers_tasks_and_writes_as_the_folder_it_was_made_of(
    tiny: Path, text: Path, pairs: Path, tmp_path: Path, evaluated: Eval
) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    file = tmp_path / "model.gguf"
    assert main(["convert", str(tiny), "--to", "gguf-f32", "--output", str(file)]) == 0
    told = evaluated(file, "--baseline", tiny, "--text", text, "--limit", 3, "--generate", 8, "--tasks", pairs)
    assert told["tasks"]["pairs"]["flips"] == 0
    assert told["tasks"]["pairs"]["acc"] == told["tasks"]["pairs"]["baseline_acc"]
    assert told["generation"]["identical"] == 1


def other_tokenizer(tiny: Path, folder: Path, *, swapped: bool = True) -> Path:
    """The same model, whose tokenizer gives most words other ids."""
    shutil.copytree(tiny, folder)
    told = json.loads((folder / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    ids = {word: token for word, token in words.items() if token > 1}
    turned = dict(zip(ids, reversed(ids.values()), strict=True)) if swapped else ids
    told["model"]["vocab"] = words | turned
    (folder / "tokenizer.json").write_text(json.dumps(told))
    return folder


def test_models_that_call_tokens_otherwise_are_not_asked_the_same(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_tokenizer(tiny, tmp_path / "other")
    options = ["--text", str(text), "--limit", "1", "--no-cache"]
    assert main(["eval", str(tiny), "--baseline", str(other), *options]) == 2
    assert f"{other}: its tokenizer is not that of {tiny}" in capsys.readouterr().err


def test_a_gguf_file_is_not_asked_with_another_models_tokenizer(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = other_tokenizer(tiny, tmp_path / "other")
    assert main(["convert", str(tiny), "--to", "gguf-f32", "--output", str(other / "model.gguf")]) == 0
    assert main(["eval", str(other / "model.gguf"), "--text", str(text), "--limit", "1", "--no-cache"]) == 2
    assert f"{other}: the tokenizer there is not that of {other}/model.gguf" in capsys.readouterr().err


def test_answers_to_another_tokenizer_are_not_those_that_were_measured(
    tiny: Path, pairs: Path, tmp_path: Path, evaluated: Eval
) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    assert main(["convert", str(tiny), "--to", "gguf-f32", "--output", str(model / "model.gguf")]) == 0
    first = evaluated(model / "model.gguf", "--tasks", pairs)
    assert evaluated(model / "model.gguf", "--tasks", pairs)["cache"]["answers"] == {"asked": 24, "found": 24}
    told = json.loads((model / "tokenizer.json").read_text())
    told["post_processor"] = None  # no longer puts <s> before a text
    (model / "tokenizer.json").write_text(json.dumps(told))
    assert evaluated(model / "model.gguf", "--tasks", pairs)["cache"]["answers"] == {"asked": 24, "found": 0}
    assert first["tasks"]["pairs"]["questions"] == 12


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "recall", "--context", "4"], "--tasks recall: length="),
        (["--generate", "0"], "--generate 0: must be at least 1"),
        (["--generate", "4"], "give --text FILE or --prompt-file FILE"),
        (["--generate", "63", "--text", "TEXT"], "--generate 63: leaves no room for a prompt in a context of 64"),
        (["--generate", "60", "--prompt-file", "TEXT"], "leaves room for 4 in a context of 64"),
        (["--tasks", "copy", "--prompt-file", "TEXT"], "give --generate N"),
        (["--text", "TEXT", "--cache", "TEXT/scores"], "give --no-cache"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_measured(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    given = [each.replace("TEXT", str(text)) for each in arguments]
    options = [] if "--cache" in given else ["--cache", str(tmp_path / "cache")]
    assert main(["eval", str(tiny), *given, *options]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("error: ") == 1
    assert says in told.err
