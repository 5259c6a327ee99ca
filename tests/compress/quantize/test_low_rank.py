"""Low-rank compensation from the stage to the folder, and back: what is given back is stored, loaded and scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import compress
from compress.calibrate.block import Block
from compress.calibrate.walk import enter, walk
from compress.checkpoint.weights import QuantizedWeights, open_model
from compress.core.metrics import relative_error
from compress.core.scheme import parse_scheme
from compress.errors import ModelError, VerificationError
from compress.inspection import inspect
from compress.models.headers import read_folder
from compress.models.store import LazyModel
from compress.pipeline import job, prepare
from compress.quantize.low_rank import LowRank
from compress.quantize.rtn import RTN
from compress.recipe import Recipe, parse
from compress.runtime.modules import Compensated, QuantLinear
from compress.stage import LayerReport

ROUND, COMPENSATE = "rtn: {scheme: w3a16, group_size: 32}", "low_rank: {rank: 8}"
SMALL = "calibration: {samples: 8, sequence_length: 48}\nevaluation: {samples: 4}\n"
TOKENS = torch.arange(2, 42).view(2, 20)


def recipe(*stages: str, rest: str = SMALL) -> Recipe:
    return parse("stages:\n" + "".join(f"  - {stage}\n" for stage in stages) + rest, "x.yaml")


def compressed(
    model: Path, text: Path, output: Path, *stages: str, rest: str = SMALL, **options: Any
) -> dict[str, Any]:
    made = recipe(*(stages or (ROUND, COMPENSATE)), rest=rest)
    return compress.run(made, model=str(model), output=output, calibration=str(text), **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint except the reports, which carry times."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith("report")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def byte_level(tiny: Path, folder: Path) -> None:
    """Give a folder the tiny model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def finished(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    compressed(tiny, text, output)
    return output


def first_block(model: Path, scratch: Path, *stages: RTN | LowRank) -> tuple[Block, Tensor, list[LayerReport]]:
    """The first block after these stages, what it returns for the calibration windows, and the last stage's reports."""
    lazy = LazyModel.open(model)
    tokens = torch.randint(2, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    scratch.mkdir()
    entrance = enter(lazy, tokens, scratch / "activations-0")
    reports: list[LayerReport] = []

    def work(block: Block) -> None:
        names = [name for site in block.sites for name in site.layers]
        for stage in stages:
            reports[:] = stage.apply(block, dict.fromkeys(names, parse_scheme("w3a16", 32)))

    block, result = next(walk(lazy, entrance, entrance.inputs, scratch, work))
    return block, result.read(0, 8).clone(), reports


class TestTheStage:
    @pytest.mark.parametrize("method", ["qera", "qera-approx", "svd"])
    def test_the_higher_the_rank_the_less_error_is_left(self, method: Any, tiny: Path, tmp_path: Path) -> None:
        _, exact, _ = first_block(tiny, tmp_path / "exact")
        _, plain, rounded = first_block(tiny, tmp_path / "plain", RTN("w3a16", 32, range="importance"))
        far, errors = [distance(plain, exact)], [sum(report.error for report in rounded)]
        for rank in (2, 8, 24):
            stages = RTN("w3a16", 32, range="importance"), LowRank(rank, method)
            _, output, reports = first_block(tiny, tmp_path / str(rank), *stages)
            far.append(distance(output, exact))
            errors.append(sum(report.error for report in reports))
        assert far == sorted(far, reverse=True)
        if method != "svd":  # which is not measured on inputs
            assert errors == sorted(errors, reverse=True)
            assert errors[-1] < 0.3 * errors[0]

    def test_at_full_rank_only_the_rounding_of_the_factors_is_left(self, tiny: Path, tmp_path: Path) -> None:
        _, _, reports = first_block(tiny, tmp_path / "a", RTN("w3a16", 32), LowRank(64))
        narrow = [report for report in reports if not report.name.endswith(("gate_proj", "up_proj", "down_proj"))]
        assert 0 < max(report.error for report in narrow) < 1e-5

    def test_the_block_computes_with_the_sum_and_a_layer_is_judged_behind_compensated_ones(
        self, tiny: Path, tmp_path: Path
    ) -> None:
        block, _, reports = first_block(tiny, tmp_path / "a", RTN("w3a16", 32), LowRank(4))
        assert [report.name for report in reports] == list(block.compensated) == list(block.quantized)
        for name, (A, B) in block.compensated.items():
            assert (A.dtype, B.dtype, A.shape[1], len(B)) == (torch.bfloat16, torch.bfloat16, 4, 4)
            expected = block.quantized[name].dequantize() + A.float() @ B.float()
            assert torch.equal(block.model.module.get_parameter(f"{name}.weight"), expected)
            assert torch.equal(block.approximation(name), expected)
        last = reports[-1]
        hessian = block.moments(block.sites[-1]).hessian
        left = relative_error(block.weight(last.name), block.approximation(last.name), hessian)
        assert last.error == pytest.approx(left, rel=1e-4)

    @pytest.mark.parametrize(("field", "value"), [("rank", 0), ("method", "lqer")])
    def test_what_it_cannot_do_is_refused(self, field: str, value: Any) -> None:
        with pytest.raises(ValueError, match=str(value)):
            LowRank(**{field: value})


class TestACheckpoint:
    def test_was_planned_to_the_byte(self, tiny: Path, text: Path, finished: Path) -> None:
        plan = prepare(recipe(ROUND, COMPENSATE), model=str(tiny), calibration=str(text))
        report = json.loads((finished / "report.json").read_text())
        written = sum(file.stat().st_size for file in finished.rglob("*.safetensors"))
        assert plan.bytes_after == report["bytes_after"] == inspect(finished)["bytes"] == written
        assert plan.bits_per_weight == report["bits_per_weight"] == inspect(finished)["bits_per_weight"]
        bare = prepare(recipe(ROUND), model=str(tiny), calibration=str(text))
        sizes = [layer.shape for layer in plan.layers if layer.scheme]
        more = sum(16 * 8 * (rows + columns) for rows, columns in sizes) / sum(
            rows * columns for rows, columns in sizes
        )
        assert plan.bits_per_weight == pytest.approx(bare.bits_per_weight + more)
        assert plan.tensor_bytes_after == bare.tensor_bytes_after
        assert {layer["rank"] for layer in plan.to_json()["layers"]} == {8, None}

    def test_loaded_it_computes_with_the_sum_and_never_makes_it(self, tiny: Path, finished: Path) -> None:
        plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        factors = load_file(finished / "adapter" / "adapter_model.safetensors")
        weights = QuantizedWeights(read_folder(finished))
        for layer in weights.schemes:
            A, B = (factors[f"base_model.model.{layer}.lora_{factor}.weight"].float() for factor in "BA")
            plain.get_submodule(layer).weight.data = weights.quantized(layer).dequantize() + A @ B
        model, _ = compress.load(finished, dtype=torch.float32)
        assert distance(logits(model), logits(plain)) < 1e-5
        held = [tensor for part in model.model.layers for tensor in (*part.parameters(), *part.buffers())]
        assert max(tensor.numel() for tensor in held if tensor.is_floating_point()) < 32 * 64  # the smallest weight
        compensated = [module for module in model.modules() if isinstance(module, Compensated)]
        assert len(compensated) == 21
        assert_close(compensated[0].dequantize(), plain.model.layers[0].self_attn.q_proj.weight.data)
        assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 3 * 4  # q, k and v are still one

    def test_in_bfloat16_it_runs_near_that(self, finished: Path) -> None:
        exact = logits(compress.load(finished, dtype=torch.float32)[0])
        assert distance(logits(compress.load(finished)[0]), exact) < 0.04

    def test_is_verified_and_scored_with_its_adapter(
        self, tiny: Path, text: Path, finished: Path, tmp_path: Path
    ) -> None:
        report = json.loads((finished / "report.json").read_text())
        assert report["verification"]["max_relative_difference"] < 1e-6
        bare = compressed(tiny, text, tmp_path / "bare", ROUND)
        divergence = report["evaluation"]["texts"][0]["kl_divergence"]
        assert divergence < 0.8 * bare["evaluation"]["texts"][0]["kl_divergence"]
        with open_model(finished).streamed() as streamed:
            assert distance(logits(streamed), logits(compress.load(finished, dtype=torch.float32)[0])) < 1e-5

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_peft_loads_the_adapter_and_computes_the_same(self, finished: Path) -> None:
        pytest.importorskip("compressed_tensors")
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
        without = logits(base)
        theirs = logits(peft.PeftModel.from_pretrained(base, finished / "adapter"))
        ours = logits(compress.load(finished, dtype=torch.float32)[0])
        assert distance(theirs, ours) < 1e-5 < 0.1 < distance(without, ours)

    def test_inspection_tells_the_rank(self, finished: Path) -> None:
        ranks = {layer["name"]: layer["rank"] for layer in inspect(finished)["layers"]}
        assert (ranks["model.layers.2.mlp.down_proj"], ranks["model.norm"]) == (8, None)

    def test_nf4_has_one_too(self, tiny: Path, text: Path, tmp_path: Path) -> None:
        stages = "rtn: {scheme: nf4}", "low_rank: {rank: 4, layers: [mlp.down, attn.q]}"
        report = compressed(tiny, text, tmp_path / "out", *stages, rest=f"{SMALL}checkpoint: {{format: bitsandbytes}}")
        assert report["verification"]["max_relative_difference"] < 1e-6
        loaded = logits(compress.load(tmp_path / "out", dtype=torch.float32)[0])
        with open_model(tmp_path / "out").streamed() as streamed:
            assert distance(loaded, logits(streamed)) < 1e-5

    def test_an_adapter_of_another_model_is_refused(self, finished: Path, tmp_path: Path) -> None:
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file({name.replace("layers.2", "layers.3"): tensor for name, tensor in tensors.items()}, file)
        with pytest.raises(ModelError, match="layers.3.*the checkpoint stores no such quantized layer"):
            compress.load(tmp_path)
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
        save_file(tensors | {name: tensors[name][:100].clone()}, file)
        with pytest.raises(
            ModelError, match=r"0.mlp.up_proj has a product of \[100, 64\], the checkpoint a weight of \[128, 64\]"
        ):
            open_model(tmp_path)

    def test_one_beside_rounded_inputs_is_refused(self, tiny: Path, text: Path, finished: Path, tmp_path: Path) -> None:
        """What is scored, (Ŵ + A B) on rounded inputs, would not be what runs."""
        compressed(tiny, text, tmp_path / "out", "rtn: {scheme: w8a8}")
        shutil.copytree(finished / "adapter", tmp_path / "out" / "adapter")
        with pytest.raises(ModelError, match="has a product of inputs as they come, the checkpoint rounds"):
            open_model(tmp_path / "out")

    def test_one_that_does_not_lie_on_disk_as_it_was_made_stops_the_run(
        self, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = job.write_products

        def damaged(folder: Path, products: Any, factors: Any) -> None:
            write(folder, products, factors | {name: (A, -B) for name, (A, B) in factors.items() if "up_proj" in name})

        monkeypatch.setattr(job, "write_products", damaged)
        with pytest.raises(VerificationError, match=r"adapter_model.safetensors: model.layers.0.mlp.up_proj does not"):
            compressed(tiny, text, tmp_path / "out")

    def test_a_layer_without_error_is_left_alone_and_its_place_is_kept(
        self, tiny: Path, text: Path, tmp_path: Path
    ) -> None:
        """Weights that lie on the grid of eight bits already."""
        model = AutoModelForCausalLM.from_pretrained(tiny)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                levels = torch.randint(-127, 128, parameter.shape, generator=generator)
                levels[:, 0], levels[:, 1] = -128, 127
                parameter.data = (levels / 1024).bfloat16()
        model.save_pretrained(tmp_path / "model")
        byte_level(tiny, tmp_path / "model")
        stages = "rtn: {scheme: w8a16, group_size: null, symmetric: false, range: minmax}", COMPENSATE
        report = compressed(tmp_path / "model", text, tmp_path / "out", *stages)
        assert {layer["fallback"] for layer in report["stages"][1]["layers"]} == {
            "not compensated: a product of rank 8 leaves no less error"
        }
        plan = prepare(recipe(*stages), model=str(tmp_path / "model"))
        assert plan.bytes_after == report["bytes_after"]
        assert not any(
            tensor.any() for tensor in load_file(tmp_path / "out/adapter/adapter_model.safetensors").values()
        )


class TestADenseFolder:
    def test_has_the_sum_for_a_weight_and_no_adapter(
        self, tiny: Path, text: Path, finished: Path, tmp_path: Path
    ) -> None:
        output, dense = tmp_path / "out", f"{SMALL}checkpoint: {{format: dense}}"
        report = compressed(tiny, text, output, rest=dense)
        assert not (output / "adapter").exists()
        plan = prepare(recipe(ROUND, COMPENSATE, rest=dense), model=str(tiny))
        assert (
            plan.bytes_after
            == report["bytes_after"]
            == sum(file.stat().st_size for file in output.glob("*.safetensors"))
        )
        assert report["verification"]["max_relative_difference"] < 1e-6
        merged, packed = open_model(output).weights, open_model(finished).weights
        for leaf in "qkv":  # later layers have seen inputs of weights that are rounded to bfloat16
            name = f"model.layers.0.self_attn.{leaf}_proj.weight"
            assert torch.equal(merged.read(name), packed.read(name).bfloat16())

    def test_holds_weights_that_lie_the_other_way(self, tiny: Path, text: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
        byte_level(tiny, tmp_path / "model")
        dense = f"{SMALL}checkpoint: {{format: dense}}"
        stages = "rtn: {scheme: w2a16, group_size: 32}", "low_rank: {rank: 32}"
        report = compressed(tmp_path / "model", text, tmp_path / "out", *stages, rest=dense)
        assert report["verification"]["max_relative_difference"] < 1e-6
        before, after = (
            load_file(tmp_path / name) for name in ("model/model.safetensors", "out/model-00001-of-00003.safetensors")
        )
        name = "transformer.h.0.mlp.c_fc.weight"
        assert distance(after[name], before[name]) < 0.01


class TestAnInterruptedRun:
    def test_that_ends_between_blocks_resumes_to_the_same_bytes(
        self, tiny: Path, text: Path, finished: Path, tmp_path: Path
    ) -> None:
        def interrupt(phase: str, share: float, words: str) -> None:
            if words == "block 2 of 3":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compressed(tiny, text, tmp_path / "out", progress=interrupt)
        compressed(tiny, text, tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == contents(finished)

    @pytest.mark.parametrize("block", [0, 1])
    def test_one_that_ends_between_products_and_manifest_does_too(
        self, block: int, tiny: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, written = job.write_products, []

        def interrupted(*arguments: Any) -> None:
            write(*arguments)
            written.append(arguments)
            if len(written) == block + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(job, "write_products", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compressed(tiny, text, tmp_path / "out")
        monkeypatch.undo()
        compressed(tiny, text, tmp_path / "out", resume=True)
        assert contents(tmp_path / "out") == contents(finished)
