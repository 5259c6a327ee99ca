"""The stage `depth`: the folder it leaves is the model with those blocks deleted, and those are the right ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import compress
from compress.core.depth import Turn
from compress.errors import RecipeError
from compress.models import anatomy_for
from compress.models.headers import read_folder
from compress.models.store import LazyModel
from compress.pipeline import prepare
from compress.pipeline.texts import Texts
from compress.prune.depth import Depth, turns
from compress.recipe import parse

SMALL = ["calibration.samples=6", "calibration.sequence_length=32", "evaluation.samples=2"]
TOKENS = torch.randint(2, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def saved(model: nn.Module, tokenizer: Path, folder: Path) -> Path:
    """Random in float32, biases and norms too; the third block hardly changes anything."""
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    block = model.get_submodule("model.layers.2")
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        for parameter in layer.parameters():
            parameter *= 1e-3
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of five blocks with biases."""
    torch.manual_seed(2)
    config = LlamaConfig.from_pretrained(tiny, num_hidden_layers=5, attention_bias=True, mlp_bias=True)
    return saved(LlamaForCausalLM(config), tiny, tmp_path_factory.mktemp("deep") / "model")


def stage(options: str) -> Any:
    return parse(f"stages:\n  - depth: {{{options}}}\ncheckpoint: {{format: dense}}\n", "x.yaml")


def run(model: Path, text: Path, output: Path, options: str) -> dict[str, Any]:
    """What the report says of the stage."""
    report = compress.run(stage(options), model=str(model), output=output, calibration=str(text), overrides=SMALL)
    assert report["verification"]["max_relative_difference"] == 0
    (facts,) = report["segments"]
    return facts


@contextmanager
def answering(model: nn.Module, modules: Sequence[str], answer: Callable[..., Tensor]) -> Iterator[None]:
    """Within, these modules answer something else."""
    found = [model.get_submodule(name) for name in modules]
    for module in found:
        module.forward = answer
    yield
    for module in found:
        del module.forward


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor, without: Sequence[int] = (), silent: Sequence[str] = ()) -> Tensor:
    """Of the model without some blocks, and with layers whose output is zero."""
    blocks = [f"model.layers.{block}" for block in without]
    with (
        answering(model, blocks, lambda hidden, *_, **__: hidden),
        answering(model, silent, lambda x: torch.zeros(*x.shape[:-1], model.config.hidden_size)),
    ):
        return model(tokens, use_cache=False).logits


def divergences(model: nn.Module, tokens: Tensor, sets: Iterable[Sequence[int]]) -> list[float]:
    """Of the model without each of these sets of blocks from the whole one."""
    whole = logits(model, tokens).log_softmax(dim=-1)
    losses = (whole - logits(model, tokens, blocks).log_softmax(dim=-1) for blocks in sets)
    return [float((whole.exp() * lost).sum(dim=-1).mean()) for lost in losses]


def test_the_folder_is_the_model_with_those_blocks_deleted(deep: Path, text: Path, tmp_path: Path) -> None:
    removed = run(deep, text, tmp_path / "out", "remove: 2, criterion: window")["removed"]
    assert removed in ([1, 2], [2, 3])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert torch.equal(logits(loaded(tmp_path / "out"), TOKENS), logits(loaded(deep), TOKENS, removed))


def test_each_score_of_greedy_removal_is_the_divergence_of_the_shortened_model(
    deep: Path, text: Path, tmp_path: Path
) -> None:
    facts = run(deep, text, tmp_path / "out", "remove: 2, samples: 3")
    options = {"model": str(deep), "calibration": str(text), "overrides": SMALL}
    tokens = Texts.read(prepare(stage("remove: 2"), **options)).windows.tokens[:3]
    alone, pairs = [(block,) for block in range(5)], [(2, block) for block in (0, 1, 3, 4)]
    expected = divergences(loaded(deep), tokens, [*alone, *pairs])
    first, second = facts["scores"]
    assert facts["removed"] == [int(min(step, key=step.get)) for step in (first, second)]
    assert facts["removed"][0] == 2
    assert [*first] == ["0", "1", "2", "3", "4"]
    assert [*second] == ["0", "1", "3", "4"]
    assert [*first.values(), *second.values()] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 2])
def test_turns_are_of_the_stream_between_blocks(span: int, deep: Path, tmp_path: Path) -> None:
    streams: list[Tensor] = []
    model = loaded(deep)
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0][:, 1:]))
    model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0][:, 1:]))
    model(TOKENS)
    expected = [Turn().including(*pair) for pair in zip(streams, streams[span:], strict=False)]
    found = turns(LazyModel.open(deep), TOKENS, tmp_path, span)
    assert [turn.num_tokens for turn in found] == [4 * 23] * (6 - span)
    assert [turn.influence for turn in found] == pytest.approx([turn.influence for turn in expected], rel=1e-4)


def test_a_silent_half_is_stored_as_zeros_and_a_block_without_halves_goes(
    deep: Path, text: Path, tmp_path: Path
) -> None:
    facts = run(deep, text, tmp_path / "out", "remove: 3, unit: half")
    assert {*facts["removed"][:2]} == {"2.attention", "2.mlp"}
    block, half = facts["removed"][2].split(".")
    layer = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[half]
    tensors = {
        name: value for file in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(file).items()
    }
    new = int(block) - (int(block) > 2)
    silent = {f"model.layers.{new}.{layer}.weight", f"model.layers.{new}.{layer}.bias"}
    assert {name for name, value in tensors.items() if not value.any()} == silent
    expected = logits(loaded(deep), TOKENS, [2], [f"model.layers.{block}.{layer}"])
    assert torch.equal(logits(loaded(tmp_path / "out"), TOKENS), expected)


def test_sliding_windows_stay_with_their_blocks_and_the_cache_works(tiny: Path, text: Path, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=4,
        layer_types=kinds,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    folder = saved(Gemma3ForCausalLM(config), tiny, tmp_path / "gemma")
    (removed,) = run(folder, text, tmp_path / "out", "remove: 1")["removed"]
    del kinds[removed]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == kinds
    model = loaded(tmp_path / "out")
    assert torch.equal(logits(model, TOKENS), logits(loaded(folder), TOKENS, [removed]))
    options = {"max_new_tokens": 12, "do_sample": False}
    written, again = (model.generate(TOKENS[:2], use_cache=cached, **options) for cached in (True, False))
    assert torch.equal(written, again)


def test_by_influence_the_idle_block_goes_and_a_stage_behind_works_on_the_others(
    deep: Path, text: Path, tmp_path: Path
) -> None:
    stages = "stages:\n  - depth: {remove: 1, criterion: influence}\n  - rtn: {scheme: w8a16, group_size: 32}\n"
    compress.run(
        parse(stages, "x.yaml"), model=str(deep), output=tmp_path / "out", calibration=str(text), overrides=SMALL
    )
    model, _ = compress.load(tmp_path / "out", dtype=torch.float32)
    expected = logits(loaded(deep), TOKENS, [2])
    assert len(model.model.layers) == 4
    assert (model(TOKENS).logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("remove: 0", "remove=0 must be a whole number of units, or a share of them below 1"),
        ("remove: 1.5", "remove=1.5 must be a whole number of units, or a share of them below 1"),
        ("remove: 1, samples: 0", "samples=0 must be at least 1; 16 is usual"),
        ("remove: 1, criterion: loss", "criterion must be 'influence', 'window' or 'greedy_kl', not 'loss'"),
        ("remove: 1, unit: half, criterion: window", "criterion=window looks at whole blocks. Use greedy_kl"),
        ("remove: 4", "x.yaml:2:5: remove=4 of 5 blocks: 2 blocks have to stay, so 3 at most"),
        ("remove: 0.9", "remove=0.9 of 5 blocks: 2 blocks have to stay, so 3 at most"),
        ("remove: 7, unit: half", "remove=7 of 5 blocks: 2 blocks have to stay, so 6 at most"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: str, told: str, deep: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(stage(options), model=str(deep))
    assert told in str(caught.value)


def test_a_share_is_of_all_units_and_one_goes_at_least() -> None:
    assert [Depth(share).count(100) for share in (0.29, 0.5, 0.001)] == [29, 50, 1]
    assert Depth(0.5, unit="half").count(5) == 5
    assert Depth(3).count(100) == 3


def test_models_that_cannot_be_shortened_are_refused(deep: Path) -> None:
    folder = read_folder(deep)
    anatomy = anatomy_for(folder.config, folder.shapes)
    some = {name: header for name, header in folder.tensors.items() if name != "model.layers.3.mlp.up_proj.weight"}
    assert Depth(1).problems(anatomy, some) == [
        "block 3 has other tensors than block 0; only where all are alike can some be left out"
    ]
    headless, nameless = replace(anatomy, head=None), replace(anatomy, sites=anatomy.sites[:2])
    assert "no head whose predictions could diverge" in Depth(1).problems(headless, folder.tensors)[0]
    assert Depth(1, "influence").problems(headless, folder.tensors) == []
    assert "0 layers are known to end the mlp" in Depth(1, unit="half").problems(nameless, folder.tensors)[0]
    with pytest.raises(ValueError, match="unit='head' must be one of block, half"):
        Depth(1, unit="head")  # type: ignore[arg-type]


def test_greedy_removal_picks_one_of_the_two_best_blocks_of_a_trained_model(assets: Path, tmp_path: Path) -> None:
    folder = assets / "models/stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def windows(name: str) -> Tensor:
        lines = (assets / f"data/{name}.jsonl").read_text().splitlines()[:40]
        stories = " ".join(json.loads(line)["text"] for line in lines)
        return torch.tensor(tokenizer(stories, verbose=False)["input_ids"][: 8 * 128]).view(8, 128)

    units, _ = Depth(2).choose(LazyModel.open(folder), windows("calibration"), tmp_path / "scratch")
    chosen = [block for block, _ in units]
    for count in (1, 2):
        sets = [*combinations(range(5), count)]
        found = dict(zip(sets, divergences(loaded(folder), windows("test"), sets), strict=True))
        assert tuple(sorted(chosen[:count])) in sorted(sets, key=found.__getitem__)[:2]
