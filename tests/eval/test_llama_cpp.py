"""A GGUF file as llama.cpp computes with it, through both of its bindings, beside the folder that it was made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compress.models.store import load_tokenizer
from compress.pipeline.convert import convert
from compress.scoring.opened import Resident, opened
from eval.evaluate import ScoreError
from eval.llama_bindings import LlamaCppError
from eval.llama_cpp import LlamaCpp

MODULES = {"llama-cpp-python": "llama_cpp", "cyllama": "cyllama"}


@pytest.fixture(scope="module")
def file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(tiny, "gguf-f32", path)
    return path


@pytest.fixture(params=MODULES)
def package(request: pytest.FixtureRequest, without: Callable[[str], None]) -> str:
    """One of the packages, the only one that is installed."""
    pytest.importorskip(MODULES[request.param], reason=f"{request.param} is not installed")
    for other in {*MODULES} - {request.param}:
        without(MODULES[other])
    return str(request.param)


@pytest.fixture
def model(package: str, file: Path) -> LlamaCpp:
    found = LlamaCpp(file)
    assert found.runs_on.startswith(f"{package} ")
    return found


def test_without_any_of_them_the_error_says_how_to_install_one(file: Path, without: Callable[[str], None]) -> None:
    for module in MODULES.values():
        without(module)
    with pytest.raises(
        LlamaCppError, match="model.gguf: GGUF files run on .*; pip install llama-cpp-python or cyllama"
    ):
        LlamaCpp(file)


def test_a_package_that_does_not_work_is_passed_by(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cyllama", reason="cyllama is not installed")
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    assert LlamaCpp(file).runs_on.startswith("cyllama ")
    monkeypatch.setitem(sys.modules, "cyllama", None)
    with pytest.raises(LlamaCppError, match=r"\(llama-cpp-python: .*no attribute.*; cyllama: .*\); pip install"):
        LlamaCpp(file)


@pytest.mark.parametrize("length", [1, 2, 64])
def test_its_logits_are_those_of_the_folder(model: LlamaCpp, tiny: Path, length: int) -> None:
    tokens = torch.randint(2, 258, (3, length), generator=torch.Generator().manual_seed(length))
    with opened(tiny) as folder:
        expected = folder(tokens)
    found = model(tokens)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_windows_do_not_see_each_other(model: LlamaCpp) -> None:
    tokens = torch.randint(2, 258, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens)[1:], model(tokens[1:]))


def test_it_writes_what_the_folder_writes(model: LlamaCpp, tiny: Path) -> None:
    prompt = load_tokenizer(tiny)("every").input_ids
    expected = Resident(tiny).write(prompt, 24)
    assert len(expected) == 24
    assert model.write(prompt, 24) == expected
    assert model.write(prompt, 1) == expected[:1]
    assert model.write(prompt, 24, stop=lambda written: len(written) == 5) == expected[:5]


def test_it_ends_where_the_text_ends(model: LlamaCpp, tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    assert model.binding.ends(tokenizer.eos_token_id)
    prompt = tokenizer("every").input_ids
    first, second, *_ = model.write(prompt, 8)
    model.binding.ends = lambda token: token == second  # type: ignore[method-assign]
    assert model.write(prompt, 8) == [first, second]


def test_it_knows_how_long_its_input_may_be_and_how_wide_its_logits_are(model: LlamaCpp) -> None:
    assert (model.context, model.vocabulary) == (64, 258)


def test_a_file_that_is_none_is_refused_by_name(package: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LlamaCppError, match=r"bad\.gguf: llama\.cpp cannot read it"):
        LlamaCpp(tmp_path / "bad.gguf")


def test_tokens_that_are_none_stop_it_with_a_sentence(model: LlamaCpp) -> None:
    with pytest.raises(ScoreError, match="llama.cpp stopped .*at token 0 of 4"):
        model(torch.tensor([[1, 2, 3, 100_000]]))
