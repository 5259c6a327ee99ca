"""What is loaded computes what the plain model with the dequantized weights computes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from compress.checkpoint.compressed_tensors import CompressedTensors
from compress.checkpoint.weights import QuantizedWeights
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid, Scheme
from compress.errors import ModelError
from compress.runtime.load import load
from compress.runtime.modules import QuantLinear, SharedLinear

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GRIDS = [Grid(4, True, 32), Grid(4, False, 32), Grid(3, False, None), Grid(8, True, None)]


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)).to(dtype)


def qwen() -> nn.Module:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gpt_neox() -> nn.Module:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))


def save_tokenizer(folder: Path) -> None:
    vocabulary = {chr(ord("0") + index): index for index in range(48)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1").save_pretrained(folder)


def random_quantized(shape: tuple[int, int], grid: Grid, seed: int, dtype: torch.dtype) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = shape[0], grid.num_groups(shape[1])
    codes = torch.randint(grid.qmin, grid.qmax + 1, shape, generator=generator, dtype=torch.int8)
    zeros = torch.randint(grid.qmin, grid.qmax + 1, groups, generator=generator, dtype=torch.int8)
    scale = (torch.rand(groups, generator=generator) - 0.5) / grid.qmax
    return QuantizedTensor(codes, scale.to(dtype), None if grid.symmetric else zeros, grid)


def compressed(
    folder: Path,
    model: Any,
    grid: Grid,
    codec: CompressedTensors | None = None,
    *,
    other: dict[str, Grid] | None = None,
    kept: tuple[str, ...] = ("lm_head", "embed_out"),
) -> nn.Module:
    """Write a quantized folder; the model itself gets the dequantized weights and is what is expected.

    `other`: end of a layer's name → its own grid.
    """
    codec = codec or CompressedTensors()
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    grids: dict[str, Grid] = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in kept:
            shape = module.out_features, module.in_features
            own = next((each for end, each in (other or {}).items() if name.endswith(end)), grid)
            weight = random_quantized(shape, own, seed, module.weight.dtype)
            del tensors[f"{name}.weight"]
            tensors |= codec.encode(name, weight)
            grids[name] = own
            module.weight.data = weight.dequantize(module.weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = codec.quantization_config(
        {name: Scheme(each) for name, each in grids.items()}, list(kept)
    )
    (folder / "config.json").write_text(json.dumps(config))
    return model


TOKENS = torch.arange(40).view(2, 20)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("build", [llama, qwen, gpt_neox])
def test_in_float32_it_equals_the_plain_model_with_dequantized_weights(build: Any, grid: Grid, tmp_path: Path) -> None:
    expected = compressed(tmp_path, build(), grid)
    model, _ = load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)


def test_codes_stored_one_to_a_byte_are_read_as_well(tmp_path: Path) -> None:
    expected = compressed(tmp_path, llama(), Grid(4, True, 32), CompressedTensors("int-quantized"))
    model, _ = load(tmp_path)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)


def test_a_bfloat16_checkpoint_runs_in_bfloat16_near_the_plain_model(tmp_path: Path) -> None:
    expected = compressed(tmp_path, llama(dtype=torch.bfloat16), Grid(4, True, 32))
    model, _ = load(tmp_path)
    assert model.dtype == torch.bfloat16
    exact = logits(expected).float()
    assert (logits(model).float() - exact).norm() < 0.02 * exact.norm()


def test_every_quantized_layer_and_no_other_is_a_quant_linear(tmp_path: Path) -> None:
    compressed(tmp_path, llama(tied=False), Grid(4, True, 32))
    model, _ = load(tmp_path)
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    alone = [f"model.layers.{index}.{name}" for index in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")]
    shared = [name for name, module in model.named_modules() if isinstance(module, SharedLinear)]
    assert plain == ["lm_head"]
    assert [name for name in quantized if not name.endswith("shared.linear")] == alone
    assert len(quantized) == 2 * 4
    assert len(shared) == 2 * 5


def test_layers_that_share_an_input_but_no_grid_are_run_alone(tmp_path: Path) -> None:
    grids = {"mlp.up_proj": Grid(8, True, 32), "self_attn.k_proj": Grid(4, False, 32)}
    expected = compressed(tmp_path, llama(), Grid(4, True, 32), other=grids)
    model, _ = load(tmp_path, dtype=torch.float32)
    block = model.model.layers[0]
    assert isinstance(block.mlp.gate_proj, QuantLinear)
    assert isinstance(block.mlp.up_proj, QuantLinear)
    assert isinstance(block.self_attn.k_proj, QuantLinear)
    assert block.self_attn.q_proj.shared is block.self_attn.v_proj.shared
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)


def test_a_quantized_head_is_a_quant_linear(tmp_path: Path) -> None:
    expected = compressed(tmp_path, llama(tied=False), Grid(4, True, 32), kept=())
    model, _ = load(tmp_path, dtype=torch.float32)
    assert isinstance(model.lm_head, QuantLinear)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    compressed(tmp_path, llama(tied=True), Grid(4, True, 32))
    model, _ = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_gradient_is_kept_and_the_model_is_in_evaluation_mode(tmp_path: Path) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    model, _ = load(tmp_path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_transformers_does_not_take_the_loaded_model_for_one_of_its_own_quantized_ones(
    tmp_path: Path,
) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    model, _ = load(tmp_path)
    assert "quantization_config" not in model.config.to_dict()
    assert model.netsuke_quantization["quant_method"] == "compressed-tensors"


def test_codes_of_one_launch_at_a_time_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    read: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    original = QuantizedWeights.quantized

    def watched(self: QuantizedWeights, layer: str) -> QuantizedTensor:
        alive.append(sum(reference() is not None for reference in read))
        weight = original(self, layer)
        read.append(weakref.ref(weight.codes))
        return weight

    monkeypatch.setattr(QuantizedWeights, "quantized", watched)
    load(tmp_path)
    assert sorted(alive) == [0] * 8 + [1] * 4 + [2] * 2  # q k v together, gate and up, o and down alone


def test_generation_settings_of_the_folder_are_used(tmp_path: Path) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 17}')
    model, _ = load(tmp_path)
    assert model.generation_config.eos_token_id == 17


def test_an_ordinary_folder_is_the_plain_transformers_model(tmp_path: Path) -> None:
    expected = llama().eval()
    expected.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, tokenizer = load(tmp_path)
    assert torch.equal(logits(model), logits(expected))
    assert tokenizer.eos_token == "1"


def test_a_quantized_tensor_without_a_layer_is_named(tmp_path: Path) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    tensors = load_file(tmp_path / "model.safetensors")
    stray = random_quantized((32, 32), Grid(4, True, 32), 0, torch.float32)
    tensors |= CompressedTensors().encode("model.extra", stray)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.extra is stored as a quantized .* has no such module"):
        load(tmp_path)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is cut off"):
        load(tmp_path)


def test_a_dtype_that_torch_does_not_know_is_refused(tmp_path: Path) -> None:
    compressed(tmp_path, llama(), Grid(4, True, 32))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float31"}))
    with pytest.raises(ModelError, match="float31"):
        load(tmp_path)
