"""GGUF files: what is written is read back, codes stay what they were, and damaged files are refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import compress
from compress.checkpoint.gguf import export, kind_named, load
from compress.checkpoint.gguf_file import LAYOUTS, GGUFFile, TensorInfo, save
from compress.checkpoint.gguf_metadata import metadata_of, rope_factors
from compress.checkpoint.weights import open_weights
from compress.errors import ModelError, NumericalError
from compress.models.store import load_tokenizer
from compress.quantize.rtn import RTN
from compress.recipe import CheckpointOptions, Evaluation, Recipe

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 259, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4-bit weights in groups of 32, with scales of float16."""
    output = tmp_path_factory.mktemp("gguf") / "awq"
    recipe = Recipe("awq", (RTN("w4a16", 32),), checkpoint=CheckpointOptions("awq"), evaluation=Evaluation(samples=1))
    compress.run(recipe, model=str(tiny), output=output)
    return output


def test_codes_of_ours_are_in_the_file_as_they_were(packed: Path, tmp_path: Path) -> None:
    weights = open_weights(packed)
    written = export(weights, "Q4_0", load_tokenizer(packed), tmp_path / "model.gguf")
    assert (written.exact, written.requantized, written.kinds) == (21, 0, {"Q4_0": 21})
    back = load(tmp_path / "model.gguf")
    assert len(back) == len({name.partition(".q")[0] for name in back}) >= 21
    for name, value in back.items():
        assert torch.equal(value, weights.read(name).float()), name


def test_other_types_are_made_anew_and_counted(packed: Path, tmp_path: Path) -> None:
    written = export(open_weights(packed), "Q8_0", load_tokenizer(packed), tmp_path / "model.gguf")
    assert (written.exact, written.requantized) == (0, 21)
    before, after = open_weights(packed), load(tmp_path / "model.gguf")
    for name, value in after.items():
        dense = before.read(name).float()
        assert (value - dense).norm() <= 0.01 * dense.norm()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=False)),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, query_pre_attn_scalar=SIZES["head_dim"], pad_token_id=0)),
    ],
    ids=["qwen3", "gemma2"],
)
def test_other_families_come_back_as_they_were(make: Any, config: Any, tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make(config).save_pretrained(tmp_path / "model")
    weights = open_weights(tmp_path / "model")
    export(weights, "F32", load_tokenizer(tiny), tmp_path / "model.gguf")
    back = load(tmp_path / "model.gguf")
    assert set(back) == set(weights.tensors)
    for name, value in back.items():
        torch.testing.assert_close(value, weights.read(name).float(), rtol=0, atol=1e-7 if "norm" in name else 0)


@pytest.mark.parametrize("added", [0.0, 1.0], ids=["same", "other"])
def test_a_stored_head_of_gemma_is_left_out_where_it_is_the_embedding(added: float, tiny: Path, tmp_path: Path) -> None:
    GemmaForCausalLM(GemmaConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + added
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    weights, output = open_weights(tmp_path / "model"), tmp_path / "model.gguf"
    if added:
        with pytest.raises(ModelError, match=r"lm_head\.weight: llama\.cpp's gemma has no such tensor"):
            export(weights, "F32", load_tokenizer(tiny), output)
    else:
        export(weights, "F32", load_tokenizer(tiny), output)
        assert set(load(output)) == set(tensors) - {"lm_head.weight"}


def test_a_weight_that_a_type_does_not_hold_is_named_and_nothing_is_left(tiny: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][2, 3] = 1e7
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"^model\.layers\.1\.self_attn\.q_proj\.weight: weights up to 1e\+07 have"
    ):
        export(open_weights(tmp_path / "model"), "Q4_0", load_tokenizer(tiny), tmp_path / "model.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_merges_and_special_words_without_an_embedding_are_left_out() -> None:
    """And rows that no word belongs to are filled."""
    words = ["a", "b", "ab", "abb", "abab", "<s>"]
    model = BPE({word: index for index, word in enumerate(words)}, [("a", "b"), ("ab", "b"), ("ab", "ab")])
    backend = Tokenizer(model)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    config = SIZES | {"model_type": "llama", "vocab_size": 4}
    few, many = (metadata_of(config | {"vocab_size": size}, tokenizer, "F32", "x") for size in (4, 8))
    assert few["tokenizer.ggml.tokens"] == words[:4]
    assert few["tokenizer.ggml.merges"] == ["a b", "ab b"]
    assert (few["tokenizer.ggml.add_bos_token"], many["tokenizer.ggml.add_bos_token"]) == (False, True)
    assert "tokenizer.ggml.bos_token_id" not in few
    assert many["tokenizer.ggml.bos_token_id"] == 5
    assert many["tokenizer.ggml.tokens"][6:] == ["[PAD6]", "[PAD7]"]
    assert many["tokenizer.ggml.token_type"] == [1, 1, 1, 1, 1, 3, 5, 5]


def test_the_head_says_what_llama_cpp_asks_for(packed: Path, tmp_path: Path) -> None:
    export(open_weights(packed), "Q4_0", load_tokenizer(packed), tmp_path / "model.gguf")
    file = GGUFFile(tmp_path / "model.gguf")
    told = file.metadata
    assert (told["general.architecture"], told["general.file_type"]) == ("llama", 2)
    assert (told["llama.block_count"], told["llama.attention.head_count_kv"]) == (3, 2)
    assert told["tokenizer.ggml.model"] == "gpt2"
    assert len(told["tokenizer.ggml.tokens"]) == 258
    assert told["tokenizer.ggml.add_bos_token"] is True
    query = file.infos["blk.0.attn_q.weight"]
    assert (query.shape, query.kind) == ((64, 64), "Q4_0")
    assert file.infos["blk.0.attn_norm.weight"].kind == "F32"


def test_llama_3_scaling_divides_low_frequencies_only() -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    factors = rope_factors({"rope_parameters": rope, "hidden_size": 4096, "num_attention_heads": 32})
    assert (factors[0], factors[-1], len(factors)) == (1.0, 8.0, 64)
    assert factors == sorted(factors)


def test_what_llama_cpp_does_not_know_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match="model_type 'bert' cannot be written as GGUF"):
        metadata_of({"model_type": "bert"}, load_tokenizer(tiny), "F16", "x")
    with pytest.raises(ValueError, match="There are gguf-q4_0"):
        kind_named("gguf-q9")


def whole(path: Path) -> bytes:
    infos = [TensorInfo("a", (2, 32), "Q8_0"), TensorInfo("b", (3,), "F32")]
    save(path, {"x": "text", "y": [1, -2], "z": True}, infos, [torch.zeros(68, dtype=torch.uint8), torch.ones(3)])
    return path.read_bytes()


def test_a_file_reads_back(tmp_path: Path) -> None:
    whole(tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    assert file.metadata == {"x": "text", "y": [1, -2], "z": True}
    assert torch.equal(file.read("b"), torch.ones(3))
    assert file.read("a").shape == (2, 34)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda held: b"GGML" + held[4:], "expected GGUF"),
        (lambda held: held[:40], "is no whole GGUF file|claims"),
        (lambda held: held[:-32], "inside b. Download it again"),
        (lambda held: held[:8] + struct.pack("<Q", 1 << 40) + held[16:], "claims 1099511627776 tensors"),
        (lambda held: held[:24] + struct.pack("<Q", 1 << 60) + held[32:], "claims a text of"),
        (lambda held: held.replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 99, 0)), "of ggml's type 99"),
        (lambda held: held.replace(struct.pack("<2Q", 32, 2), struct.pack("<2Q", 33, 2)), "no whole blocks"),
        (lambda held: b"", "is no whole GGUF file"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(whole(path)))
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def made(path: Path, name: str, kind: str = "F32", **metadata: Any) -> Path:
    """A file of one tensor of zeros [4, 256]."""
    info = TensorInfo(name, (4, 256), kind)
    told = {"general.architecture": "llama"} | {key.replace("__", "."): value for key, value in metadata.items()}
    save(path, told, [info], [torch.zeros(info.nbytes, dtype=torch.uint8)])
    return path


@pytest.mark.parametrize("heads", [{}, {"llama__attention__head_count": 3}, {"llama__attention__head_count": 0}])
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, heads: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=r"a\.gguf: blk\.0\.attn_q\.weight has 4 rows, for"):
        load(made(tmp_path / "a.gguf", "blk.0.attn_q.weight", **heads))


@pytest.mark.parametrize(
    "name", ["blk.².attn_v.weight", "blk.attn_v.weight", "blk.0.nothing.weight", "other.weight", "x"]
)
def test_names_that_are_none_are_passed_by(tmp_path: Path, name: str) -> None:
    assert load(made(tmp_path / "a.gguf", name)) == {}


def test_a_block_of_any_number_is_read_at_once(tmp_path: Path) -> None:
    assert set(load(made(tmp_path / "a.gguf", "blk.3000000.attn_v.weight"))) == {
        "model.layers.3000000.self_attn.v_proj.weight"
    }


def test_an_architecture_that_is_no_word_is_none(tmp_path: Path) -> None:
    path = made(tmp_path / "a.gguf", "blk.0.attn_v.weight", general__architecture=5)
    assert set(load(path)) == {"model.layers.0.self_attn.v_proj.weight"}


def test_types_that_are_not_decoded_are_told_and_refused(tmp_path: Path) -> None:
    file = GGUFFile(made(tmp_path / "a.gguf", "blk.0.ffn_down.weight", "IQ4_XS"))
    assert (file.infos["blk.0.ffn_down.weight"].kind, file.infos["blk.0.ffn_down.weight"].nbytes) == ("IQ4_XS", 4 * 136)
    with pytest.raises(ModelError, match="is of type IQ4_XS, which netsuke does not decode"):
        file.read("blk.0.ffn_down.weight")


def test_layouts_are_those_of_ggml() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    for name, (number, size, nbytes) in LAYOUTS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, size, nbytes)


def test_a_tensor_of_nothing_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.gguf", {}, [TensorInfo("x", (0, 32), "F32")], [torch.zeros(0)])
    with pytest.raises(ModelError, match=r"x has sizes \[32, 0\], and holds nothing"):
        GGUFFile(tmp_path / "a.gguf")
