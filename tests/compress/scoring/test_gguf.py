"""GGUF files asked as transformers models are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ModelError
from compress.models.store import load_tokenizer
from compress.pipeline.convert import convert
from compress.scoring import gguf
from compress.scoring.compare import compare
from compress.scoring.gguf import ResidentFile, context_of_file, file_tokenizer, place_of
from compress.scoring.opened import Resident, resident
from compress.scoring.vocabulary import vocabulary_of
from eval.evaluate import default_context
from eval.tasks import load_tasks, run_tasks
from eval.texts import prepended_bos, tokenize

pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
TEXTS = ["once upon a time, there was\n\n  a carver", "", "naïve café 木彫り 🦊"]


@pytest.fixture(scope="module")
def file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(tiny, "gguf-f32", path)
    return path


def test_its_own_tokenizer_is_that_of_the_folder(file: Path, tiny: Path) -> None:
    pytest.importorskip("gguf", reason="transformers reads a file's tokenizer by the package gguf")
    found, expected = file_tokenizer(file, None), load_tokenizer(tiny)
    assert tokenize(TEXTS, found).tolist() == tokenize(TEXTS, expected).tolist()
    assert prepended_bos(found) == prepended_bos(expected) == 0
    assert found.eos_token_id == expected.eos_token_id
    assert {**found.get_vocab(), **expected.get_vocab()} == found.get_vocab(), "transformers may add words of its own"


def test_a_folder_that_holds_one_file_and_no_other_model_is_that_file(file: Path, tiny: Path, tmp_path: Path) -> None:
    assert place_of(str(file.parent)) == file
    assert place_of(str(tiny)) == tiny
    shutil.copy(file, tmp_path / "a.gguf")
    shutil.copy(file, tmp_path / "b.gguf")
    assert place_of(str(tmp_path)) == tmp_path


def test_a_tokenizer_beside_it_or_of_the_baseline_comes_first(
    file: Path, tiny: Path, tmp_path: Path, without: Callable[[str], None]
) -> None:
    without("gguf")
    assert file_tokenizer(file, tiny).get_vocab() == load_tokenizer(tiny).get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny / name, tmp_path)
    shutil.copy(file, tmp_path)
    assert file_tokenizer(tmp_path / file.name, None).get_vocab() == load_tokenizer(tiny).get_vocab()


def test_where_there_is_none_the_error_says_what_to_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gguf")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", missing)
    with pytest.raises(ModelError, match=r"model.gguf: its tokenizer cannot be read \(Please install gguf\). Put"):
        file_tokenizer(file, None)


def test_it_answers_as_the_folder_does(file: Path, tiny: Path) -> None:
    tokens = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(0))
    found, expected = resident(file), resident(tiny)
    assert isinstance(found, ResidentFile)
    assert isinstance(expected, Resident)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-3)


def test_a_prompt_is_continued_alike_until_a_criterion_is_met(file: Path, tiny: Path) -> None:
    ids = torch.tensor([[3, 5, 8, 13]])
    expected = Resident(tiny).generate(ids, attention_mask=torch.ones_like(ids), max_length=12, do_sample=False)
    assert ResidentFile(file).generate(ids, max_length=12).tolist() == expected.tolist()
    short = ResidentFile(file).generate(ids, max_length=12, stopping_criteria=[lambda ids, _: ids.shape[1] == 7])
    assert short.tolist() == expected[:, :7].tolist()


@pytest.mark.parametrize(
    ("size", "says"), [(50, "in 50 bytes|is no whole GGUF file"), (20_000, "ends at byte 20000, inside .*Download it")]
)
def test_a_damaged_file_is_refused_by_what_is_wrong_with_it(file: Path, tmp_path: Path, size: int, says: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(file.read_bytes()[:size])
    for use in (ResidentFile, context_of_file, vocabulary_of):
        with pytest.raises(ModelError, match=rf"bad\.gguf: .*({says})"):
            use(tmp_path / "bad.gguf")


def test_files_are_opened_once_for_what_is_computed(
    file: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for name in ("a", "b", "c"):
        shutil.copy(file, tmp_path / f"{name}.gguf")
        names.append(str(tmp_path / f"{name}.gguf"))
    opened = []
    llama_cpp = gguf.llama_cpp
    monkeypatch.setattr(gguf, "llama_cpp", lambda file: opened.append(str(file)) or llama_cpp(file))
    compare(names, texts=[text], limit=1)
    assert opened == names
    opened.clear()
    for _ in range(2):
        compare(names, texts=[text], limit=1, cache=tmp_path / "cache")
    assert opened == names[:1], "copies are one model, and nothing is opened for what was measured before"


def test_it_is_opened_when_something_is_first_asked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "llama_cpp", lambda file: pytest.fail(f"{file} was opened"))
    assert default_context(ResidentFile(file).config) == 64


def test_stop_strings_of_a_task_end_what_it_writes(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install netsuke[tasks]")
    folder, questions = assets / "models/stories260k", tmp_path / "questions.jsonl"
    written: list[list[int]] = []
    convert(folder, "gguf-f32", tmp_path / "model.gguf")
    questions.write_text('{"text": "Once upon a time, there"}\n{"text": "Lily wanted to"}\n')
    task = {
        "task": "written", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "x",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 64}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    model = ResidentFile(tmp_path / "model.gguf")
    write = model.model.write

    def counted(*arguments: Any) -> list[int]:
        written.append(write(*arguments))
        return written[-1]

    model.model.write = counted
    tokenizer = load_tokenizer(folder)
    run_tasks(model, tokenizer, load_tasks([task]))
    assert len(written) == 2
    assert all(tokenizer.decode(text).index(".") == len(tokenizer.decode(text)) - 1 for text in written)


def test_answers_that_are_drawn_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="draws its answers at random"):
        ResidentFile(file).generate(torch.ones(1, 2, dtype=torch.long), max_length=4, do_sample=True)
