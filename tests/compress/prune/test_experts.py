"""The stage `experts`: what nobody asks for goes for nothing, and what adds little goes before what adds much."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import compress
from compress.calibrate.routing import Routing
from compress.errors import RecipeError
from compress.models.headers import read_folder
from compress.models.store import LazyModel, Weights, load_tokenizer
from compress.pipeline import prepare
from compress.prune.experts import Experts, shares
from compress.recipe import parse

SMALL = ["calibration.samples=8", "calibration.sequence_length=48", "evaluation.samples=4"]
NUM_EXPERTS = 6
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": NUM_EXPERTS, "intermediate_size": 48}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
}
Change = Callable[[int, Any], None]


def mixture(family: str, tiny: Path, folder: Path, change: Change) -> Path:
    """A random model with `change` done to the mixture of each block; a coordinate of its stream is always 1."""
    config_class, model_class, more = MODELS[family]
    config = json.loads((tiny / "config.json").read_text())
    kept = {name: config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")}
    torch.manual_seed(0)
    model = model_class(
        config_class(**kept, **more, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.2)
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1
        for index, block in enumerate(model.model.layers):
            for weight in (block.self_attn.o_proj.weight, block.mlp.experts.down_proj):
                weight.mul_(0.3)[..., 0, :] = 0
            block.mlp.gate.weight[:, 0] = 0
            change(index, block.mlp)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / file, folder / file)
    return folder


def recipe(options: str) -> Any:
    return parse(f"stages: [experts: {{{options}}}]\ncheckpoint: {{format: dense}}", "x.yaml")


def run(model: Path, text: Path, output: Path, options: str) -> dict[str, Any]:
    return compress.run(recipe(options), model=str(model), output=output, calibration=str(text), overrides=SMALL)


def sentence(folder: Path) -> Tensor:
    return load_tokenizer(folder)("the carver keeps every small detail of what matters", return_tensors="pt").input_ids


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(sentence(folder)).logits


@pytest.mark.parametrize("family", MODELS)
def test_without_the_experts_that_the_router_never_picks_the_model_computes_the_same(
    family: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    def shun(index: int, mlp: Any) -> None:
        mlp.gate.weight[[index, 4], 0] = -50

    model = mixture(family, tiny, tmp_path / "model", shun)
    plan = prepare(recipe("keep: 4"), model=str(model))
    report = run(model, text, tmp_path / "out", "keep: 4")
    assert report["bytes_after"] == plan.bytes_after < plan.bytes_before
    assert report["verification"]["max_relative_difference"] < 1e-5
    assert_close(logits(tmp_path / "out"), logits(model), rtol=0, atol=1e-4)
    (facts,) = report["segments"]
    assert [each["kept"] for each in facts["mixtures"].values()] == [[1, 2, 3, 5], [0, 2, 3, 5]]
    assert [each["tokens"][4] for each in facts["mixtures"].values()] == [0, 0]
    assert "model.layers.0.mlp: fewer than 100 calibration tokens were routed to experts 0 (0)" in facts["notes"][0]


def test_what_adds_little_goes_and_that_is_better_than_what_chance_would_take(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    """Three experts of six are picked seldom, for a small share, and say less. (Were they picked like others, those
    that say more would answer in their place, and the model would be farther from what it was.)"""

    def neglect(index: int, mlp: Any) -> None:
        unimportant = [index, index + 2, index + 4]
        mlp.gate.weight[unimportant, 0] = -1
        mlp.experts.down_proj[unimportant] *= 0.5

    model = mixture("mixtral", tiny, tmp_path / "model", neglect)
    report = run(model, text, tmp_path / "out", "keep: 0.5")
    found = [each["kept"] for each in report["segments"][0]["mixtures"].values()]
    assert found == [[1, 3, 5], [0, 2, 4]]
    headers = read_folder(model)
    whole = Weights(headers)
    stage = Experts(keep=3)

    def divergence(kept: Tensor) -> float:
        learned = {"kept": kept, "shares": torch.nn.functional.one_hot(kept, NUM_EXPERTS).double()}
        fewer = stage.weights(stage.folder(headers, whole.anatomy, whole.tensors, learned), learned)
        results = []
        for weights in (whole, fewer):
            lazy = LazyModel(weights, dtype=torch.float32)
            with lazy.streamed():
                results.append(lazy.logits(sentence(model)).log_softmax(dim=-1))
        before, after = results
        return float((before.exp() * (before - after)).sum(dim=-1).mean())

    generator = torch.Generator().manual_seed(0)
    chance = [torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:3] for _ in found]) for _ in range(4)]
    assert divergence(torch.tensor(found)) < 0.6 * min(map(divergence, chance))


def test_merged_experts_are_means_by_tokens_of_those_most_alike(tiny: Path, text: Path, tmp_path: Path) -> None:
    similarity = torch.tensor([[1, 0.1, 0.2, 0], [0.1, 1, 0.9, 0.3], [0.2, 0.9, 1, 0.1], [0, 0.3, 0.1, 1]])
    seen = Routing(torch.tensor([5, 30, 10, 0]), torch.zeros(4), similarity)
    kept = torch.tensor([0, 1])
    assert torch.equal(shares(kept, seen), torch.eye(4, dtype=torch.float64)[kept])
    expected = torch.tensor([[1, 0, 0, 0], [0, 0.75, 0.25, 0]], dtype=torch.float64)
    assert_close(shares(kept, seen, merge=True), expected)
    unused = torch.tensor([[0, 0, 0, 1.0]], dtype=torch.float64)
    assert torch.equal(
        shares(torch.tensor([3]), Routing(seen.tokens * 0, seen.contributions, similarity), True), unused
    )
    model = mixture("mixtral", tiny, tmp_path / "model", lambda index, mlp: None)
    report = run(model, text, tmp_path / "out", "keep: 1, merge: true")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 1
    tokens = torch.tensor(report["segments"][0]["mixtures"]["model.layers.1.mlp"]["tokens"]).double()
    whole, merged = (Weights(read_folder(folder)) for folder in (model, tmp_path / "out"))
    name = "model.layers.1.mlp.experts.down_proj"
    mean = torch.einsum("e,eoi->oi", tokens / tokens.sum(), whole.read(name).double())
    assert_close(merged.read(name)[0], mean.float())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("keep: 0", "keep=0 must be a number of experts, as 6, or a share below 1, as 0.75"),
        ("keep: 1.0", "keep=1.0 must be a number of experts"),
        ("keep: 6", "keep=6: each of 2 blocks has 6 experts, so none would go. Keep fewer"),
        ("keep: 0.95", "keep=0.95: each of 2 blocks has 6 experts, so none would go"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused(options: str, told: str, tiny: Path, tmp_path: Path) -> None:
    model = mixture("mixtral", tiny, tmp_path / "model", lambda index, mlp: None)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(options), model=str(model))
    assert told in str(caught.value)


def test_a_model_without_experts_is_refused(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="llama: has no mixture of experts that is known here"):
        prepare(recipe("keep: 2"), model=str(tiny))
