"""The stage `width`: the folder it leaves is the model without those units, and the others make up for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertModel

import compress
from compress.calibrate.block import Block
from compress.calibrate.observers import MomentsObserver
from compress.calibrate.walk import enter, walk
from compress.core.metrics import relative_error
from compress.errors import RecipeError
from compress.models import anatomy_for
from compress.models.headers import read_folder
from compress.models.store import LazyModel
from compress.pipeline import prepare
from compress.pipeline.texts import Texts
from compress.prune.width import Score, Width, narrowed
from compress.recipe import parse

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "BertModel": (SHAPE, "ffn: 0.5"),
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "ffn: 0.5"),
    "GPTNeoXForCausalLM": (SHAPE, "ffn: 0.5"),
    "OPTForCausalLM": (SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "ffn: 0.5"),
    "Phi3ForCausalLM": (GROUPED, "ffn: 0.5"),
    "Qwen2ForCausalLM": (SHAPE | {"num_key_value_heads": 4}, "ffn: 0.5, heads: 0.75"),
    "Qwen3ForCausalLM": (GROUPED | {"head_dim": 16}, "heads: 0.5"),
    "Gemma2ForCausalLM": (GROUPED | {"head_dim": 16, "sliding_window": 8}, "ffn: 0.5, heads: 0.5"),
}
WINDOWS = ["calibration.samples=4", "calibration.sequence_length=32", "evaluation.samples=2"]
TOKENS = torch.randint(2, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def recipe(*stages: str) -> Any:
    return parse("stages:\n" + "".join(f"  - {stage}\n" for stage in stages), "x.yaml")


def saved(architecture: str, tokenizer: Path, folder: Path, **changes: Any) -> Path:
    """A model of this architecture, random in float32, biases and norms too."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(vocab_size=258, **FAMILIES.get(architecture, (GROUPED, ""))[0] | changes)
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    model.save_pretrained(folder)
    return folder


def silence(layer: nn.Module, units: int, kept: int) -> None:
    """Make all but the `kept` largest of a layer's units of input zero."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    parts = weight.unflatten(1, (units, -1))
    parts[:, parts.square().sum(dim=(0, 2)).argsort()[: units - kept]] = 0


@pytest.mark.parametrize("architecture", FAMILIES)
@torch.no_grad()
def test_a_narrow_folder_computes_what_the_model_does_with_those_units_silent(
    architecture: str, tiny: Path, tmp_path: Path
) -> None:
    model = saved(architecture, tiny, tmp_path / "model")
    shares = FAMILIES[architecture][1]
    stage = f"width: {{{shares}, score: magnitude, refit: false, multiple: 8}}"
    folder, opened = read_folder(model), BertModel if architecture == "BertModel" else AutoModelForCausalLM
    anatomy, whole = anatomy_for(folder.config, folder.shapes), opened.from_pretrained(model)
    for block in whole.get_submodule(anatomy.blocks):
        for name, role in anatomy.roles.items():
            layer = block.get_submodule(name)
            if role == "mlp.down" and "ffn" in shares:
                width = 128 if architecture == "GPT2LMHeadModel" else 48
                silence(layer, width, width // 2)
            if role == "attn.o" and "heads" in shares:
                groups = whole.config.num_key_value_heads
                silence(layer, groups, groups - 1)
    report = compress.run(recipe(stage), model=str(model), output=tmp_path / "out")
    narrow = opened.from_pretrained(tmp_path / "out")
    assert torch.allclose(narrow(TOKENS)[0], whole(TOKENS)[0], atol=1e-5)
    assert sum(tensor.numel() for tensor in narrow.state_dict().values()) < sum(
        tensor.numel() for tensor in whole.state_dict().values()
    )
    planned = prepare(recipe(stage), model=str(model))
    assert (report["parameters_after"], report["bytes_after"]) == (planned.parameters_after, planned.bytes_after)


@pytest.mark.parametrize("score", get_args(Score))
def test_refitted_to_correlated_inputs_a_layer_loses_much_less(score: Score) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, mixing = (torch.randn(shape, generator=generator) for shape in ((12, 16), (16, 6)))
    inputs = torch.randn(400, 6, generator=generator) @ mixing.T + 0.1 * torch.randn(400, 16, generator=generator)
    observer = MomentsObserver(16)
    observer.update(inputs)
    seen, scores = observer.result(400, "layer"), torch.rand(8, generator=generator)

    def error(refit: bool) -> float:
        left = narrowed(weight, seen, 5, 2, score=score, refit=refit, scores=scores)
        assert left.weight.shape == (12, 10)
        spread = torch.zeros(12, 8, 2)
        spread[:, left.units] = left.weight.view(12, 5, 2)
        return relative_error(weight, spread.flatten(1), seen.hessian)

    assert error(refit=True) < 0.1 * error(refit=False)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_by_taylor_each_block_keeps_the_units_that_matter_most_to_the_loss_of_the_original_model(
    architecture: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    shares = "ffn: 0.5, heads: 0.5" if architecture == "LlamaForCausalLM" else "ffn: 0.5"
    folder = saved(architecture, tiny, tmp_path / "model")
    stage = f"width: {{{shares}, score: taylor, refit: false, multiple: 8}}"
    plan = prepare(recipe(stage), model=str(folder), calibration=str(text), overrides=WINDOWS)
    compress.run(plan.recipe, model=str(folder), output=tmp_path / "out")
    model, narrow = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out"))
    roles = {
        role: layer
        for layer, role in plan.anatomy.roles.items()
        if role in ("mlp.down", "attn.o")[: 1 + ("heads" in shares)]
    }
    seen: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(tuple(roles.values())):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
    tokens = Texts.read(plan).windows.tokens
    gradients = torch.autograd.grad(model(tokens, labels=tokens).loss, [inputs for _, inputs in seen])
    assert len(seen) == 2 * len(roles)
    for (name, inputs), gradient in zip(seen, gradients, strict=True):
        size = 1 if name.endswith(roles["mlp.down"]) else 16
        scores = (inputs * gradient).flatten(0, -2).unflatten(1, (-1, size)).sum(2).square().sum(0)
        kept = scores.topk(len(scores) // 2).indices.sort().values
        columns = model.get_submodule(name).weight.unflatten(1, (-1, size))[:, kept].flatten(1)
        assert torch.equal(narrow.get_submodule(name).weight, columns), name


def test_a_resumed_run_finds_its_scores(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: str, **options: Any) -> bytes:
        given = recipe("width: {ffn: 0.5, score: taylor}")
        out = tmp_path / output
        compress.run(given, model=str(tiny), output=out, calibration=str(text), overrides=WINDOWS, **options)
        return b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors")))

    def interrupt(phase: str, share: float, words: str) -> None:
        if words == "width: block 2 of 3":
            raise KeyboardInterrupt

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("out", progress=interrupt)
    monkeypatch.setattr(Width, "learn", lambda *_: pytest.fail("learned again"))
    assert run("out", resume=True) == whole


def test_taylor_needs_text_even_without_a_refit(tiny: Path) -> None:
    plan = prepare(recipe("width: {ffn: 0.5, refit: false, score: taylor}"), model=str(tiny))
    assert plan.calibration_tokens > 0


def test_a_model_without_a_head_has_no_loss_to_score_by(tiny: Path, tmp_path: Path) -> None:
    model = saved("BertModel", tiny, tmp_path / "model")
    with pytest.raises(RecipeError, match=r"x\.yaml:2:5: bert: score=taylor is about predictions, .* Use score: obs"):
        prepare(recipe("width: {ffn: 0.5, score: taylor}"), model=str(model))


def test_a_bias_takes_up_the_mean(tiny: Path, tmp_path: Path) -> None:
    model = LazyModel.open(saved("OPTForCausalLM", tiny, tmp_path / "model"))
    means: list[Tensor] = []

    def mean(block: Block) -> Tensor:
        (name,) = block.sites[-1].layers
        return block.weight(name) @ block.moments(block.sites[-1]).mean.float() + block.vector(f"{name}.bias")

    def work(block: Block) -> None:
        means.append(mean(block))
        Width(ffn=0.5, multiple=8).shape(block, {})
        means.append(mean(block))

    entrance = enter(model, TOKENS, tmp_path / "activations-0")
    before, after, *_ = [means for _ in walk(model, entrance, entrance.inputs, tmp_path, work)][-1]
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("{}", "nothing would go: set ffn or heads below 1, as 0.75"),
        ("{ffn: 0.0}", "ffn=0.0 must be the share that stays, above 0 and at most 1"),
        ("{heads: 1.5}", "heads=1.5 must be the share that stays"),
        ("{ffn: 0.5, score: gradient}", "score"),
        ("{ffn: 0.5, multiple: 0}", "multiple=0 must be at least 1"),
        ("{ffn: 0.5, damping: 0.0}", "damping=0.0 must be above 0 and at most 1"),
        ("{ffn: 0.5, multiple: 128}", "ffn=0.5 of 128 channels, in multiples of 128, is all of them"),
    ],
)
def test_what_cannot_be_is_refused(fields: str, told: str, tiny: Path) -> None:
    with pytest.raises(RecipeError, match="x.yaml:2:") as caught:
        prepare(recipe(f"width: {fields}"), model=str(tiny))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("GPT2LMHeadModel", {}, "gpt2: heads cannot go, because queries, keys and values are one matrix"),
        ("OPTForCausalLM", {}, "opt: heads cannot go, because its config cannot say how many channels a head has"),
        ("Olmo2ForCausalLM", {}, "olmo2: heads cannot go, because a norm takes all heads together. Set heads: 1.0"),
        ("StableLmForCausalLM", {}, "stablelm: heads cannot go, because nobody has described its heads"),
        ("LlamaForCausalLM", {"num_key_value_heads": 1}, "all heads share one head of keys and values, so none can go"),
        (
            "LlamaForCausalLM",
            {"num_key_value_heads": 4},
            "heads=0.75 leaves 3 of 4 groups, and transformers says: The hidden size (32) is not a multiple of the "
            "number of attention heads (3). Set heads: 0.25 or 0.5",
        ),
    ],
)
def test_heads_that_cannot_go_are_told_apart(
    architecture: str, changes: dict[str, Any], told: str, tiny: Path, tmp_path: Path
) -> None:
    model = saved(architecture, tiny, tmp_path / "model", **changes)
    with pytest.raises(RecipeError, match="x.yaml:2:") as caught:
        prepare(recipe("width: {heads: 0.75}"), model=str(model))
    assert told in str(caught.value)


def test_the_width_of_an_unknown_family_stays(tiny: Path, tmp_path: Path) -> None:
    model = saved("StableLmForCausalLM", tiny, tmp_path / "model")
    with pytest.raises(RecipeError, match="stablelm: it is not known by which key its config tells ffn. Set ffn: 1.0"):
        prepare(recipe("width: {ffn: 0.5}"), model=str(model))


def test_on_stories260k_a_refit_saves_a_quarter_of_the_divergence(assets: Path, tmp_path: Path) -> None:
    def divergence(refit: str) -> float:
        report = compress.run(
            recipe(f"width: {{ffn: 0.75, heads: 0.5, refit: {refit}}}"),
            model=str(assets / "models" / "stories260k"),
            output=tmp_path / refit,
            calibration=str(assets / "data" / "calibration.jsonl"),
            overrides=["calibration.samples=8", "calibration.sequence_length=256", "evaluation.samples=4"],
        )
        return report["evaluation"]["texts"][0]["kl_divergence"]

    assert divergence("true") < 0.75 * divergence("false")
