from __future__ import annotations

import json
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import pytest
import torch

from compress.demo import (
    HELD_OUT_BYTES,
    MODEL,
    PROMPT,
    RECIPES,
    build_model,
    byte_tokenizer,
    docstrings,
    run_demo,
    split,
)
from compress.errors import DataError, OutputError


def documents(count: int) -> list[str]:
    """So many different texts of a thousand bytes each."""
    return [f"{index:04d}" * 250 for index in range(count)]


def test_docstrings_are_those_of_modules_classes_and_functions_in_the_order_of_the_paths(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text('"""B."""\nclass C:\n    """C."""\n    async def f(self):\n        """F."""\n')
    (tmp_path / "a.py").write_text('"""A."""\nx = "no documentation"\n')
    assert docstrings(tmp_path) == ["A.", "B.", "C.", "F."]


def test_a_docstring_that_stands_twice_is_collected_once(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text('"""The same."""\n')
    assert docstrings(tmp_path) == ["The same."]


def test_docstrings_do_not_come_from_installed_packages_and_tests(tmp_path: Path) -> None:
    for folder in ("site-packages", "test", "json/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text('"""Not the library\'s."""\n')
    assert docstrings(tmp_path) == []


def test_reading_docstrings_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""A."""\nraise SystemExit\n')
    assert docstrings(tmp_path) == ["A."]


def test_the_three_texts_share_no_document_and_lose_none() -> None:
    parts = split(documents(300), seed=0)
    assert sorted(text for part in parts for text in part) == documents(300)


def test_held_out_texts_have_their_size() -> None:
    _, calibration, test = split(documents(300), seed=0)
    assert sum(map(len, calibration)) == sum(map(len, test)) == HELD_OUT_BYTES


def test_another_seed_holds_other_documents_out() -> None:
    assert split(documents(300), seed=0)[2] != split(documents(300), seed=1)[2]


def test_a_library_without_sources_is_an_error() -> None:
    with pytest.raises(DataError, match="100 documentation strings are too few"):
        split(documents(100), seed=0)


@pytest.mark.parametrize("text", ["plain", "  spaces\n\n\ttabs", "naïve ∑ 根付", "\x00\x7f"])
def test_a_token_is_a_byte_and_bytes_come_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_the_end_of_text_is_one_token() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer("a<|endoftext|>b")["input_ids"][1] == tokenizer.eos_token_id == 256


@dataclass
class Built:
    """A model after eight steps on a part of the library, no good, but trained; what `build_model` returned and told on
    the way."""

    folder: Path
    facts: dict[str, float]
    shares: list[float]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, library, shares = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("library"), list[float]()
    for package in ("asyncio", "email", "http", "logging", "unittest"):
        copytree(Path(sysconfig.get_path("stdlib"), package), library / package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda _: str(library))
        facts = build_model(folder, steps=8, progress=lambda phase, done, words: shares.append(done))
    return Built(folder, facts, shares)


def test_a_few_steps_of_training_beat_a_guess(built: Built) -> None:
    assert built.facts["loss"] < math.log(257) - 0.5


def test_transformers_loads_the_model_and_its_tokenizer(built: Built) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built.folder / MODEL)
    model = AutoModelForCausalLM.from_pretrained(built.folder / MODEL)
    tokens = tokenizer("Return the", return_tensors="pt")["input_ids"]
    assert tokens.shape == (1, 10)
    assert torch.isfinite(model(tokens).logits).all()


def test_the_weights_are_stored_in_16_bits(built: Built) -> None:
    stored = (built.folder / MODEL / "model.safetensors").stat().st_size
    assert stored == pytest.approx(2 * built.facts["parameters"], rel=0.01)


def test_every_shipped_group_divides_every_layer_of_the_model(built: Built) -> None:
    config = json.loads((built.folder / MODEL / "config.json").read_text())
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0


@pytest.mark.parametrize("name", ["calibration.jsonl", "test.jsonl"])
def test_held_out_texts_are_documents_one_a_line(built: Built, name: str) -> None:
    lines = (built.folder / name).read_text(encoding="utf-8").splitlines()
    assert sum(len(json.loads(line)["text"].encode()) for line in lines) >= HELD_OUT_BYTES


def test_progress_rises_to_the_whole(built: Built) -> None:
    assert built.shares == [step / 8 for step in range(9)]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_demo_orders_its_recipes_by_what_they_cost(tmp_path: Path) -> None:
    """After an eighth of its training, on a quarter of its text."""
    original, *rows = run_demo(tmp_path / "demo", steps=50, windows=32)
    assert [row["recipe"] for row in rows] == list(RECIPES)
    by_recipe = {row["recipe"]: row for row in rows}
    assert all(row["bytes"] < original["bytes"] for row in rows)
    assert original["perplexity"] < 20
    divergences = [by_recipe[name]["kl_divergence"] for name in ("w8a16-rtn", "w4a16-gptq", "w3a16-gptq")]
    assert divergences == sorted(divergences)
    assert all(Path(row["report"]).is_file() for row in rows)
    assert all(row["sample"].startswith(PROMPT) and len(row["sample"]) > len(PROMPT) for row in rows)
