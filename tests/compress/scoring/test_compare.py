"""Several checkpoints scored as one request: what is refused beforehand, and what fails on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.errors import RequestError
from compress.pipeline.convert import convert
from compress.recipe import parse
from compress.scoring.compare import _reason, compare


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 8 bits and in 4, in folders `w8` and `w4`, and without a block, in `depth`."""
    folder = tmp_path_factory.mktemp("compare")
    for bits in (8, 4):
        stage = parse(f"stages: [{{rtn: {{scheme: w{bits}a16, group_size: 32}}}}]", "x.yaml")
        compress.run(stage, model=str(tiny), output=folder / f"w{bits}")
    shutil.copytree(tiny, folder / "depth")
    config = json.loads((tiny / "config.json").read_text())
    (folder / "depth" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    tensors = load_file(tiny / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.2.")}
    save_file(kept, folder / "depth" / "model.safetensors", {"format": "pt"})
    return folder


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--no-cache", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def damaged(folder: Path, copy: Path) -> Path:
    """A copy with a weight that is not finite, which only a measurement can find."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_each_model_is_scored_as_it_would_be_alone(
    tiny: Path, small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--baseline", tiny, "--text", text, "--limit", 3)
    result = compared(capsys, small / "w8", small / "w4", small / "depth", tiny, *asked)
    assert [row["model"] for row in result["models"]] == [str(small / name) for name in ("w8", "w4", "depth")] + [
        str(tiny)
    ]
    for row in result["models"]:
        assert main(["eval", row["model"], *map(str, asked), "--no-cache", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["texts"] == row["texts"]
        assert main(["inspect", row["model"], "--json"]) == 0
        held = json.loads(capsys.readouterr().out)
        assert (held["bytes"], held["format"], held["bits_per_weight"]) == (
            row["bytes"],
            row["format"],
            row.get("bits_per_weight"),
        )
    assert result["baseline"] == str(tiny)
    assert result["models"][-1]["texts"][0]["kl_divergence"] == 0
    assert result["pareto"] == [str(small / "w4"), str(small / "w8"), str(tiny)]


def test_without_a_baseline_perplexity_counts(small: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = compared(capsys, small / "w8", small / "w8", "--text", text, "--limit", 1)
    assert result["baseline"] is None
    assert result["pareto"] == [str(small / "w8")] == [row["model"] for row in result["models"]]


def test_all_see_the_windows_that_the_shortest_context_allows(
    tiny: Path, small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "short")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    result = compared(capsys, small / "w8", tmp_path / "short", "--text", text, "--limit", 1)
    assert [row["texts"][0]["context"] for row in result["models"]] == [16, 16]


def test_who_fails_on_the_way_says_why_and_costs_nobody_else(
    tiny: Path, small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, page = damaged(tiny, tmp_path / "broken"), tmp_path / "page.html"
    command = ["compare", str(broken), str(small / "w8"), "--baseline", str(tiny), "--text", str(text), "--limit", "1"]
    assert main([*command, "--no-cache", "--json", "--report", str(page)]) == 1
    told = capsys.readouterr()
    failed, scored = json.loads(told.out)["models"]
    assert "not finite" in failed["error"]
    assert (failed["texts"], failed["tasks"]) == ([], {})
    assert scored["texts"][0]["kl_divergence"] > 0
    assert "error" not in scored
    assert told.err.count("error: ") == 1
    assert f"error: {broken}: " in told.err
    assert "was not scored" in page.read_text(encoding="utf-8")


def test_another_programs_error_is_told_by_its_kind_and_first_line() -> None:
    assert _reason(RuntimeError("out of memory\nat …")) == "RuntimeError: out of memory"
    assert _reason(MemoryError()) == "MemoryError"


def test_the_terminal_shows_the_smallest_model_first(
    tiny: Path, small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", small / "w8", small / "w4", "--baseline", tiny, "--text", text, "--limit", 1, "--no-cache"]
    assert main([*map(str, command)]) == 0
    told = capsys.readouterr().out
    assert told.index(str(small / "w4")) < told.index(str(small / "w8"))


def test_all_that_is_wrong_beforehand_is_said_at_once(
    tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    length = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1000])
    shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    shutil.copytree(tiny, tmp_path / "renamed")
    tokenizer = tmp_path / "renamed" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"</s>"', '"<e>"'))
    models = [str(tmp_path / name) for name in ("none", "cut", "other", "renamed")]
    assert main(["compare", str(tiny), *models, "--text", str(text), "--no-cache"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        f"error: {tmp_path}/none: no such model folder. Give a folder with config.json and *.safetensors",
        f"error: {file}: is cut off, {length - 1000:,} of {length:,} bytes. Download it again",
        f"error: {tmp_path}/other: has a vocabulary of 300, {tiny} one of 258. Compare models that share one",
        f"error: {tmp_path}/renamed: its tokenizer is not that of {tiny}. Compare models that share one",
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to score: give --text FILE"),
        (["--text", "nosuch.txt"], "nosuch.txt"),
        (["--text", "TEXT", "--context", "0"], "--context 0: must be at least 2"),
        (["--text", "TEXT", "--report", "nosuch/page.html"], "--report nosuch/page.html: there is no folder"),
    ],
)
def test_a_wrong_request_is_said_once_and_not_in_every_row(
    tiny: Path, small: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert main(["compare", str(tiny), str(small / "w8"), *arguments, "--no-cache"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("error: ") == 1
    assert complaint in told.err


def test_what_was_measured_before_is_counted_over_all_models(
    tiny: Path, small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", small / "w8", small / "w4", "--baseline", tiny, "--text", text, "--limit", 2]
    command += ["--cache", tmp_path, "--json"]
    results = []
    for _ in range(2):
        assert main([*map(str, command)]) == 0
        results.append(json.loads(capsys.readouterr().out))
    first, second = results
    assert first["models"] == second["models"]
    assert second["cache"]["windows"] == {"asked": 4, "found": 4}


def test_a_gguf_file_is_beside_the_folder_it_was_made_of(tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install cyllama)")
    file = tmp_path / "model.gguf"
    convert(tiny, "gguf-q8_0", file)
    found = compare([str(file), str(tiny)], baseline=str(tiny), texts=[text], limit=2)
    row = found["models"][0]
    assert (row["format"], row["bytes"]) == ("gguf", file.stat().st_size)
    assert 0 < row["texts"][0]["kl_divergence"] < 0.01
    with pytest.raises(RequestError, match=r"nothing.gguf: there is no such file"):
        compare([str(tmp_path / "nothing.gguf")], texts=[text], limit=2)
