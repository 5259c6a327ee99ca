"""Speed and memory of a model beside its baseline, measured in processes of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.bench import BYTES, SPEEDS, Subject, Work, bench, warning
from compress.cli import main
from compress.errors import RequestError, RunError
from compress.recipe import parse

SHORT = ["--prompt-tokens", "16", "--tokens", "4", "--repetitions", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "small"
    compress.run("w4a16-rtn", model=str(tiny), output=str(folder), overrides=["rtn.group_size=32"])
    return folder


def test_two_models_are_measured_in_one_run(tiny: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(small), "--baseline", str(tiny), *SHORT, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    original, ratio = result["baseline_values"], result["ratio"]
    assert ratio.keys() == {*SPEEDS, *BYTES}
    for key in (*SPEEDS, *BYTES):
        assert result[key] > 0
        assert original[key] > 0
    assert (result["scheme"], original["scheme"]) == ("w4a16", "bfloat16")
    assert result["threads"] == original["threads"] == 1
    assert original["weights_bytes"] == pytest.approx((tiny / "model.safetensors").stat().st_size, rel=0.05)
    assert ratio["weights_bytes"] == result["weights_bytes"] / original["weights_bytes"] < 1
    slower = min(ratio[key] for key in SPEEDS) < 1
    assert (result["warning"] is not None) == slower


def test_one_model_alone_has_no_ratio_and_its_quantized_cache_is_measured_with_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = parse("stages: [{kv_cache: {scheme: kv8}}]", "x.yaml")
    compress.run(stages, model=str(tiny), output=tmp_path / "out", overrides=["evaluation.samples=1"])
    assert main(["bench", str(tmp_path / "out"), *SHORT]) == 0
    told = capsys.readouterr().out
    assert "bfloat16 with kv8" in told
    assert "writing, tokens/s" in told
    assert "16 tokens read and 4 written, batch 1" in told
    assert "ratio" not in told


def test_a_folder_that_is_none_is_one_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", str(tmp_path / "none"), *SHORT]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("error: ") == 1


def test_more_tokens_than_the_context_are_refused_with_the_numbers(tiny: Path) -> None:
    with pytest.raises(RequestError, match=r"--prompt-tokens 60 --tokens 8: are 68 together, .*, 64"):
        bench(str(tiny), work=Work(prompt_tokens=60, tokens=8))


@pytest.mark.parametrize("key", ["prompt_tokens", "tokens", "batch", "threads", "repetitions"])
def test_no_work_is_no_request(key: str) -> None:
    with pytest.raises(RequestError, match=f"--{key.replace('_', '-')} 0: must be at least 1"):
        Work(**{key: 0})


def test_a_process_that_dies_is_an_error_that_names_the_model(tiny: Path) -> None:
    with Subject(str(tiny)) as subject, pytest.raises(RunError, match="tiny.*: its process died"):
        subject.call(os._exit, 9)


RATIO: dict[str, Any] = {SPEEDS[0]: 1.5, SPEEDS[1]: 3.0, "weights_bytes": 0.3, "peak_memory_bytes": 0.5}


def test_what_is_faster_is_not_warned_of() -> None:
    assert warning("w4a16", Work(), RATIO) is None


def test_what_is_slower_is_said_in_one_sentence() -> None:
    told = warning("w4a16", Work(batch=16), RATIO | {SPEEDS[1]: 0.8})
    assert told == (
        "with batch 16, w4a16 writes at 0.80× the speed of the baseline on this machine; "
        "its weights take 0.30× the memory"
    )
    both = warning("w4a16", Work(), RATIO | {SPEEDS[0]: 0.9, SPEEDS[1]: 0.8}) or ""
    assert "reads prompts of 512 tokens at 0.90× and writes at 0.80× the speed" in both
