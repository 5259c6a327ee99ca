"""Bias correction: outputs keep their mean, later layers see it, and what has no bias is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import OPTConfig, OPTForCausalLM

from compress.calibrate.block import Block
from compress.calibrate.walk import enter, walk
from compress.core.scheme import parse_scheme
from compress.errors import RecipeError
from compress.models.store import LazyModel
from compress.pipeline import prepare
from compress.quantize.bias_correction import BiasCorrection, mean_shift
from compress.quantize.rtn import RTN
from compress.recipe import parse

RECIPE = "stages:\n  - {first}\n  - {second}\n"
ROUND, CORRECT = "rtn: {scheme: w3a16, group_size: null}", "bias_correction: {}"


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small OPT blocks with random weights and biases."""
    folder = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=128, word_embed_proj_dim=32, max_position_embeddings=64, **shape))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def outputs(model: Path, scratch: Path, *stages: RTN | BiasCorrection) -> tuple[Block, torch.Tensor]:
    """The first block after these stages, and what it returns for the calibration windows."""
    lazy = LazyModel.open(model)
    tokens = torch.randint(4, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    scratch.mkdir()
    entrance = enter(lazy, tokens, scratch / "activations-0")

    def work(block: Block) -> None:
        names = [name for site in block.sites for name in site.layers]
        for stage in stages:
            stage.apply(block, dict.fromkeys(names, parse_scheme("w3a16", None)))

    block, result = next(walk(lazy, entrance, entrance.inputs, scratch, work))
    return block, result.read(0, 8).clone()


def test_the_shift_restores_the_mean_output() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rounded = torch.randn(2, 5, 7, generator=generator)
    x = torch.randn(100, 7, generator=generator) + 1
    shift = mean_shift(weight, rounded, x.mean(dim=0))
    assert_close((x @ rounded.T + shift).mean(dim=0), (x @ weight.T).mean(dim=0))


def test_a_corrected_block_is_nearer_to_the_original(biased: Path, tmp_path: Path) -> None:
    rounding = RTN("w3a16", None)
    _, exact = outputs(biased, tmp_path / "a")
    _, plain = outputs(biased, tmp_path / "b", rounding)
    block, corrected = outputs(biased, tmp_path / "c", rounding, BiasCorrection())
    assert (corrected - exact).norm() < 0.9 * (plain - exact).norm()
    assert {name for name in block.rewritten if name.endswith(".bias")} == {f"{name}.bias" for name in block.quantized}


def test_the_mean_output_of_the_last_layer_is_that_of_its_exact_weight(biased: Path, tmp_path: Path) -> None:
    block, _ = outputs(biased, tmp_path / "a", RTN("w3a16", None), BiasCorrection())
    site = block.sites[-1]
    name, mean = site.layers[0], block.moments(site).mean.float()
    bias = block.model.weights.read(f"{name}.bias")
    corrected = block.quantized[name].dequantize() @ mean + block.rewritten[f"{name}.bias"]
    assert_close(corrected, block.weight(name) @ mean + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (CORRECT, ROUND, "x.yaml:2:5: bias_correction makes up for what quantizers lost; put it after all of them"),
        (ROUND, CORRECT, "x.yaml:3:5: bias_correction would change nothing: no quantized layer has a bias"),
    ],
)
def test_where_it_could_do_nothing_it_is_refused(first: str, second: str, message: str, tiny: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(parse(RECIPE.format(first=first, second=second), "x.yaml"), model=str(tiny))
