"""2:4 weights without their zeros: the layout bit for bit, what is refused, and whole folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.checkpoint import Sparse24, format_of
from compress.checkpoint.sparse_24 import decode, encode, layout, problems
from compress.checkpoint.weights import open_weights
from compress.core.sparsity import Pattern, keep_largest
from compress.errors import ModelError, RecipeError
from compress.inspection import inspect
from compress.models.store import DTYPES
from compress.pipeline import prepare
from compress.recipe import Recipe, parse
from compress.runtime.sparse import SparseLinear

PRUNE = 'sparsify: {pattern: "2:4", method: magnitude, refit: false, layers: [mlp, attn.q]}'
SMALL = ["evaluation.samples=2", "evaluation.sequence_length=64"]


def sparse(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.where(keep_largest(weight.float().abs(), Pattern(n=2, m=4)), weight, 0)


def recipe(*stages: str, form: str = "sparse-24-bitmask") -> Recipe:
    lines = "".join(f"- {stage}\n" for stage in stages)
    return parse(f"stages:\n{lines}checkpoint: {{format: {form}}}\n", "x.yaml")


class TestLayout:
    def test_it_is_that_of_compressed_tensors(self) -> None:
        """Bytes as its own compressor writes them (0.13)."""
        weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0], [5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0]])
        stored = encode("a", weight)
        assert stored["a.compressed"].tolist() == [[1, 2, 3, 4], [5, 0, 0, 6]]
        assert stored["a.bitmask"].tolist() == [[0b1001_1010], [0b1001_0011]]
        assert stored["a.shape"].tolist() == [[2], [8]]

    @pytest.mark.parametrize("shape", [(3, 4), (5, 64), (7, 172)])
    @pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
    def test_a_weight_comes_back_and_takes_the_bytes_that_were_promised(
        self, dtype: str, shape: tuple[int, int]
    ) -> None:
        weight = sparse(*shape, DTYPES[dtype])
        stored = encode("a", weight)
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
        assert found == {name: (DTYPES[kind], size) for name, (kind, size) in layout("a", shape, dtype).items()}
        assert torch.equal(decode("a", stored), weight)
        assert decode("a", stored).dtype == weight.dtype

    def test_groups_with_fewer_weights_come_back_as_well(self) -> None:
        patterns = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
        weight = patterns[patterns.sum(dim=1) <= 2].float().view(1, -1)
        assert weight.numel() == 4 * (1 + 4 + 6)
        assert torch.equal(decode("a", encode("a", weight)), weight)

    def test_three_of_four_are_a_bug_and_called_one(self) -> None:
        weight = sparse(4, 8)
        weight[1, 4:] = 1
        with pytest.raises(ValueError, match="a: 1 of 8 groups of four weights have more than two"):
            encode("a", weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bitmask": None}, "a.bitmask: is missing"),
        ({"bitmask": torch.full((4, 1), 0b0111_0011, dtype=torch.uint8)}, "keeps other than two of four inputs"),
        ({"bitmask": torch.full((4, 1), 0b1000_0011, dtype=torch.uint8)}, "keeps other than two of four inputs"),
        (
            {"bitmask": torch.zeros(4, 2, dtype=torch.uint8)},
            r"a.bitmask: is \[4, 2\] of torch.uint8, expected \[4, 1\]",
        ),
        ({"bitmask": torch.zeros(4, 1, dtype=torch.int8)}, "of torch.int8, expected"),
        ({"compressed": torch.zeros(4, 3)}, r"a.compressed: is \[4, 3\]"),
        ({"compressed": torch.zeros(16)}, r"a.compressed: is \[16\]"),
        ({"compressed": torch.zeros(4, 4, dtype=torch.int8)}, "of torch.int8, expected floats"),
        ({"shape": torch.tensor([[1 << 40], [1 << 40]])}, r"a.shape: is .*, a.compressed says \[4, 8\]"),
        ({"weight": torch.zeros(4, 8)}, "a.weight: is stored beside a.bitmask"),
    ],
)
def test_a_damaged_layer_is_refused(change: dict[str, Tensor | None], told: str) -> None:
    stored: dict[str, Any] = encode("a", sparse(4, 8)) | {f"a.{leaf}": tensor for leaf, tensor in change.items()}
    with pytest.raises(ModelError, match=told):
        decode("a", {name: tensor for name, tensor in stored.items() if tensor is not None})


def test_bits_behind_the_last_input_are_refused() -> None:
    stored = encode("a", sparse(2, 12))
    stored["a.bitmask"][0, 1] |= 0b0011_0000
    with pytest.raises(ModelError, match="or some that are not there"):
        decode("a", stored)


def test_other_kinds_of_layer_are_told_what_to_do() -> None:
    (problem,) = problems("a", "Conv1D", Pattern(n=2, m=4))
    assert "a is a Conv1D" in problem
    assert "format: dense" in problem


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        (('sparsify: {pattern: "1:4"}',), "zeros of 2:4, and not of 1:4. Use `checkpoint: {format: dense}`"),
        (("sparsify: {sparsity: 0.5}",), "and not of 50%. Use `checkpoint: {format: dense}`"),
        (('sparsify: {pattern: "2:4"}', "rtn: {scheme: w8a16, group_size: null}"), "and not w8a16. Use format"),
        (("kv_cache: {scheme: kv8}",), "no stage prunes, so sparse-24-bitmask has nothing to leave out"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_known_before_anything_is_read(stages: tuple[str, ...], told: str, wide: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(recipe(*stages), model=str(wide))
    assert told in str(caught.value)


@pytest.fixture(scope="module")
def folders(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One pruned model, stored compactly and as an ordinary folder."""
    out = tmp_path_factory.mktemp("sparse")
    for form in ("sparse-24-bitmask", "dense"):
        compress.run(
            recipe(PRUNE, form=form), model=str(tiny), output=out / form, calibration=str(text), overrides=SMALL
        )
    return out / "sparse-24-bitmask", out / "dense"


class TestFolder:
    def test_it_takes_the_bytes_that_the_plan_says(self, folders: tuple[Path, Path], tiny: Path) -> None:
        plan = prepare(recipe(PRUNE), model=str(tiny))
        written = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
        assert plan.bytes_after == written == inspect(folders[0])["bytes"]
        layer = next(layer for layer in plan.layers if layer.role == "mlp.up")
        assert layer.bytes_after == layer.bytes_before * 9 // 16 + 16

    def test_every_tensor_is_read_as_from_the_dense_folder(self, folders: tuple[Path, Path]) -> None:
        ours, dense = map(open_weights, folders)
        for name in dense.tensors:
            assert name in ours
            assert ours.shape(name) == dense.shape(name)
            assert torch.equal(ours.read(name), dense.read(name))

    def test_it_is_scored_as_the_dense_one(self, folders: tuple[Path, Path]) -> None:
        ours, dense = (json.loads((folder / "report.json").read_text()) for folder in folders)
        assert ours["evaluation"]["texts"] == dense["evaluation"]["texts"]

    def test_loaded_it_computes_what_the_dense_one_does(self, folders: tuple[Path, Path]) -> None:
        (ours, tokenizer), (dense, _) = (compress.load(folder, dtype=torch.float32) for folder in folders)
        tokens = tokenizer("every detail is kept", return_tensors="pt").input_ids
        assert torch.equal(ours(tokens).logits, dense(tokens).logits)
        assert isinstance(ours.model.layers[1].mlp.down_proj, SparseLinear)
        assert not isinstance(ours.model.layers[1].self_attn.o_proj, SparseLinear)

    def test_inspection_tells_what_is_sparse(self, folders: tuple[Path, Path]) -> None:
        found = inspect(folders[0])
        layers = {layer["name"]: layer for layer in found["layers"]}
        up, out = layers["model.layers.0.mlp.up_proj"], layers["model.layers.0.self_attn.o_proj"]
        assert found["format"] == "sparse-24-bitmask"
        assert (up["sparsity"], up["dtype"], up["shape"]) == ("2:4", "BF16", [128, 64])
        assert (out["sparsity"], out["bytes"]) == (None, 64 * 64 * 2)

    def test_transformers_stops_with_an_error(self, folders: tuple[Path, Path]) -> None:
        """Given a method it knows, it would put random numbers in place of the layers it cannot read."""
        with pytest.raises(ValueError, match="quant_method"):
            AutoModelForCausalLM.from_pretrained(folders[0])

    def test_a_folder_of_the_original_writer_is_read_too(self, folders: tuple[Path, Path]) -> None:
        config = json.loads((folders[0] / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "compressed-tensors"
        assert format_of(config) == Sparse24()
        with pytest.raises(ModelError, match="of quantized weights cannot be read"):
            Sparse24().schemes({"config_groups": {"group_0": {}}}, {})

    def test_damage_is_found_when_it_is_loaded(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        shutil.copytree(folders[0], tmp_path / "out")
        shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
        tensors = load_file(shard)
        tensors["model.layers.1.mlp.up_proj.bitmask"][3, 2] |= 0b0000_1111
        save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="up_proj.bitmask: keeps other than two of four"):
            compress.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "layers", "folder"), [("pocket-llama-13m", 9 / 16, 0.673), ("stories260k", 17 / 32, 0.61)]
)
def test_real_models_become_as_small_as_that(name: str, layers: float, folder: float, assets: Path) -> None:
    plan = prepare("sparse-2of4", model=str(assets / "models" / name))
    pruned = [layer for layer in plan.layers if layer.action == "prune"]
    ratio = sum(layer.bytes_after for layer in pruned) / sum(layer.bytes_before for layer in pruned)
    assert layers < ratio < layers + 0.001
    assert plan.bytes_after < folder * plan.bytes_before
