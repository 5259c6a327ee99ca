"""torchao's layout: round trips, a decoder written from the description, what torchao itself writes and reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import compress
from compress.checkpoint import TorchAO, format_of
from compress.checkpoint.weights import QuantizedWeights, open_model
from compress.core.affine import params_from_range, quantize
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import FP8, FP8_TENSOR, NVFP4, Grid, Scheme
from compress.errors import ModelError, RecipeError
from compress.models.headers import TensorHeader, read_folder
from compress.pipeline import prepare
from compress.pipeline.convert import convert
from compress.quantize.rtn import RTN
from compress.recipe import CheckpointOptions, Evaluation, Recipe

INT8 = Grid(8)
GRIDS = [
    INT8,
    FP8,
    Grid(8, True, 32),
    Grid(8, False),
    Grid(4, True, 32),
    Grid(4, False, 32),
    Grid(3),
    Grid(2, False, 48),
]
FORM = TorchAO()


def weight(grid: Grid, rows: int = 64, columns: int = 96) -> QuantizedTensor:
    torch.manual_seed(0)
    dense = torch.randn(rows, columns)
    dtype = torch.bfloat16 if grid in (INT8, FP8) else torch.float32
    if grid.kind == "float":
        scale = (dense.abs().amax(1, keepdim=True) / 448).to(dtype)
        return QuantizedTensor((dense / scale.float()).to(torch.float8_e4m3fn), scale, None, grid)
    groups = dense.unflatten(1, (grid.num_groups(columns), -1))
    scale, zero_point = params_from_range(groups.amin(-1), groups.amax(-1), grid, dtype)
    return quantize(dense, scale, zero_point, grid)


def described(name: str, stored: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
    """The weight that a reader would compute, written from the format's description and nothing else."""
    words = json.loads(metadata[f"{name}.weight"])
    layer = name + "._weight_"
    found = {leaf: stored[layer + leaf] for leaf in words["_tensor_data_names"]}
    assert {key.removeprefix(layer) for key in stored if key.startswith(layer)} == found.keys()
    size = words["_data"]["block_size"][1]
    codes, weight = found["qdata"].float(), torch.empty(found["qdata"].shape)
    for column in range(codes.shape[1]):
        zero = found["zero_point"][:, column // size] if "zero_point" in found else 0
        weight[:, column] = (codes[:, column] - zero) * found["scale"][:, column // size].float()
    return weight


@pytest.mark.parametrize("grid", GRIDS, ids=str)
class TestEveryGrid:
    def test_reads_back_what_was_written(self, grid: Grid) -> None:
        tensor = weight(grid)
        stored = FORM.encode("layer", tensor)
        assert FORM.decode("layer", stored, grid) == tensor
        layout = FORM.layout("layer", tensor.shape, Scheme(grid), "F32")
        assert {key: tuple(value.shape) for key, value in stored.items()} == {
            key: shape for key, (_, shape) in layout.items()
        }
        headers: dict[str, Any] = {key: TensorHeader(key, *entry, Path(), 0) for key, entry in layout.items()}
        assert FORM.shape("layer", headers, grid) == tensor.shape
        config = FORM.quantization_config({"layer": Scheme(grid)}, ["lm_head"])
        assert format_of({"quantization_config": config}) == FORM
        assert FORM.schemes(config, headers) == {"layer": Scheme(grid)}

    def test_a_decoder_written_from_the_description_computes_the_same(self, grid: Grid) -> None:
        tensor = weight(grid)
        entries = FORM.layout("a.layer", tensor.shape, Scheme(grid), "F32") | {"norm.weight": ("F32", (3,))}
        metadata = FORM.metadata(entries, [Scheme(grid)], "F32")
        assert json.loads(metadata["tensor_names"]) == ["a.layer.weight", "norm.weight"]
        assert json.loads(metadata["norm.weight"]) == {"_type": "Tensor"}
        assert torch.equal(described("a.layer", FORM.encode("a.layer", tensor), metadata), tensor.dequantize())


def test_the_words_are_those_of_torchao() -> None:
    def words(grid: Grid) -> Any:
        entries = FORM.layout("q", (8, 64), Scheme(grid), "BF16")
        return json.loads(FORM.metadata(entries, [Scheme(grid)], "BF16")["q.weight"])

    bfloat16 = {"_type": "torch.dtype", "_data": "bfloat16"}
    assert words(INT8) == {
        "_type": "Int8Tensor",
        "_data": {"block_size": [1, 64], "dtype": bfloat16},
        "_tensor_data_names": ["qdata", "scale"],
    }
    assert words(FP8) == words(INT8) | {"_type": "Float8Tensor"}
    assert words(Grid(4, True, 32)) == {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
            "block_size": [1, 32],
            "dtype": bfloat16,
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }


INT8_WORDS = {
    "_type": "Int8WeightOnlyConfig",
    "_version": 2,
    "_data": {
        "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "group_size": None,
        "set_inductor_config": True,
    },
}
"""What torchao 0.18 writes."""


def test_what_torchao_writes_of_itself_is_read() -> None:
    stored = FORM.encode("layer", weight(INT8))
    scale = stored["layer._weight_scale"] * 1.0000001  # a float32 number
    stored |= {"layer._weight_scale": scale, "layer._weight_zero_point": torch.zeros(64, 1, dtype=torch.int8)}
    tensors = {key: TensorHeader(key, "I8", (64, 96), Path(), 0) for key in stored}
    assert FORM.schemes({"quant_type": {"default": INT8_WORDS}}, tensors) == {"layer": Scheme(INT8)}
    assert torch.equal(FORM.decode("layer", stored, INT8).scale, scale)


@pytest.mark.parametrize(
    "changed",
    [
        {"_version": 1},
        {"_type": "Int8DynamicActivationInt8WeightConfig"},
        {"_data": {"granularity": {"_type": "PerTensor"}}},
        {"_data": {"granularity": {"_type": "PerGroup", "_data": {"group_size": -1}}}},
        {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int1"}}},
        {"_type": "Float8WeightOnlyConfig", "_data": {"weight_dtype": {"_data": "float8_e5m2"}}},
    ],
)
def test_configurations_that_say_something_else_are_not_read(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="of torchao only weights alone can be read"):
        FORM.schemes({"quant_type": {"default": INT8_WORDS | changed}}, {})
    with pytest.raises(ModelError, match="None version None"):
        FORM.schemes({}, {})


def test_tensors_that_do_not_fit_are_refused() -> None:
    grid = Grid(4, True, 32)
    stored = FORM.encode("layer", weight(grid))
    codes, scale, zero = stored.values()
    for wrong, said in (
        ({"layer._weight_qdata": codes * 2}, "which is not on"),
        ({"layer._weight_qdata": codes[:, :95].contiguous()}, "not a multiple of group_size=32, as the config says"),
        ({"layer._weight_scale": scale[:, :1]}, r"is \[64, 1\] of torch.float32, expected \[64, 3\]"),
        ({"layer._weight_zero_point": zero + 1}, "are not all 0"),
        ({"layer._weight_zero_point": zero.float()}, "expected .* of I8"),
    ):
        with pytest.raises(ModelError, match=said):
            FORM.decode("layer", stored | wrong, grid)
    with pytest.raises(ModelError, match="_weight_scale: is missing"):
        FORM.decode("layer", {"layer._weight_qdata": codes}, grid)


@pytest.mark.parametrize(
    ("kind", "scheme", "said"),
    [
        ("Conv1D", Scheme(INT8), "is a Conv1D"),
        ("Linear", Scheme(INT8, INT8), "rounds inputs by a rule of its own"),
        ("Linear", Scheme(NVFP4), "not nvfp4a16"),
        ("Linear", Scheme(FP8_TENSOR), "fp8a16, and not"),
    ],
)
def test_what_it_cannot_hold_is_refused(kind: str, scheme: Scheme, said: str) -> None:
    (problem,) = FORM.problems("layer", kind, (64, 64), scheme)
    assert said in problem


def recipe(stage: RTN, form: str = "torchao", name: str = "packed") -> Recipe:
    return Recipe(name, (stage,), checkpoint=CheckpointOptions(form), evaluation=Evaluation(samples=1))


@pytest.mark.parametrize("stage", [RTN("w8a16", None), RTN("w4a16", 32, symmetric=False), RTN("fp8a16")], ids=str)
def test_each_file_of_a_run_tells_of_the_whole_folder_and_the_plan_knows_their_bytes(
    stage: RTN, tiny: Path, tmp_path: Path
) -> None:
    report = compress.run(recipe(stage), model=str(tiny), output=tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        names = json.loads(metadata["tensor_names"])
        assert {"lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"} <= {*names}
        assert metadata.keys() == {"format", "tensor_names", *names}
    weights = QuantizedWeights(read_folder(tmp_path / "out"))
    for layer in weights.schemes:
        assert torch.equal(described(layer, stored, metadata), weights.read(f"{layer}.weight"))
    planned = prepare(recipe(stage), model=str(tiny)).bytes_after
    assert planned == report["bytes_after"] == sum(file.stat().st_size for file in files)


def test_one_folder_holds_one_scheme(tiny: Path) -> None:
    stages = RTN("w4a16", 32, layers=["mlp"]), RTN("w8a16", 32)
    two = Recipe("two", stages, checkpoint=CheckpointOptions("torchao"))
    with pytest.raises(RecipeError, match="torchao holds layers of one scheme in a folder"):
        prepare(two, model=str(tiny))


def test_codes_go_there_and_back(tiny: Path, tmp_path: Path) -> None:
    compress.run(recipe(RTN("w4a16", 32), "gptq"), model=str(tiny), output=tmp_path / "gptq")
    convert(tmp_path / "gptq", "torchao", tmp_path / "torchao")
    convert(tmp_path / "torchao", "gptq", tmp_path / "back")
    there, back = (QuantizedWeights(read_folder(tmp_path / name)) for name in ("gptq", "back"))
    assert all(there.quantized(layer) == back.quantized(layer) for layer in there.schemes)
    assert back.folder.config == there.folder.config


@pytest.fixture(scope="module")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in float32, in which differences are the reader's and not the arithmetic's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("single")
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("stage", [RTN("w8a16", None), RTN("w8a16", 32), RTN("w4a16", 32, symmetric=False),
                                   RTN("w3a16", None), RTN("fp8a16")], ids=str)  # fmt: skip
def test_transformers_with_torchao_computes_the_same(stage: RTN, converted: bool, single: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own
        pytest.importorskip("torchao", reason="needs the package torchao")
        from transformers import AutoModelForCausalLM

        name = "compressed-tensors" if converted else "torchao"
        compress.run(recipe(stage, name), model=str(single), output=tmp_path / name)
        if converted:
            convert(tmp_path / name, "torchao", tmp_path / "torchao")
        theirs, told = AutoModelForCausalLM.from_pretrained(tmp_path / "torchao", output_loading_info=True)
    tokens = torch.arange(24).unsqueeze(0)
    ours = open_model(tmp_path / "torchao")
    with ours.streamed():
        expected = ours.logits(tokens)
    assert type(theirs.model.layers[0].mlp.up_proj.weight.data).__module__.startswith("torchao")
    assert not any(told.values())
    bound = 1e-5 if stage == RTN("w8a16", None) else 0.0  # it scales what an int8 product has summed
    assert (theirs(tokens).logits - expected).abs().max() <= bound * expected.abs().max()
