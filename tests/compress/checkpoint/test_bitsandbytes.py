from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

from compress.checkpoint.bitsandbytes import BitsAndBytes
from compress.checkpoint.bitsandbytes_int8 import INT8
from compress.checkpoint.bitsandbytes_nf4 import STATE
from compress.core.scheme import NF4, Scheme, parse_scheme
from compress.errors import ModelError, RecipeError
from compress.models.headers import TensorHeader
from compress.pipeline import prepare
from compress.recipe import parse


def headers(*names: str) -> dict[str, TensorHeader]:
    return {name: TensorHeader(name, "U8", (1,), Path("x"), 0) for name in names}


class TestFolder:
    def test_layers_that_have_the_tensors_of_a_scheme_are_the_quantized_ones(self) -> None:
        found = BitsAndBytes().schemes({}, headers(f"a.{STATE}", "a.weight", "b.SCB", "b.weight", "c.weight"))
        assert found == {"a": Scheme(NF4), "b": Scheme(INT8)}

    def test_a_folder_without_them_is_refused(self) -> None:
        with pytest.raises(ModelError, match="only nf4 and int8 can be read, and no layer is stored so"):
            BitsAndBytes().schemes({}, headers("b.weight", "b.weight.quant_state.bitsandbytes__fp4"))

    @pytest.mark.parametrize(("scheme", "method"), [(Scheme(NF4), "nf4"), (Scheme(INT8), "llm_int8")])
    def test_the_config_says_to_transformers_which_of_the_two_it_is(self, scheme: Scheme, method: str) -> None:
        written = BitsAndBytes().quantization_config({"a": scheme}, ["lm_head"], dtype="BF16")
        read, unknown = BitsAndBytesConfig.from_dict(written, return_unused_kwargs=True)
        assert read.quantization_method() == method
        assert read.llm_int8_skip_modules == ["lm_head"]
        assert not unknown
        assert {key: read.to_dict()[key] for key in written} == written

    def test_a_bfloat16_layer_is_multiplied_in_bfloat16(self) -> None:
        written = BitsAndBytes().quantization_config({"a": Scheme(NF4)}, [], dtype="BF16")
        assert BitsAndBytesConfig.from_dict(written).bnb_4bit_compute_dtype == torch.bfloat16


class TestPlan:
    @pytest.mark.parametrize("name", ["w4a16", "w8a8", "nvfp4"])
    def test_other_schemes_are_a_problem_with_a_fix(self, name: str) -> None:
        (problem,) = BitsAndBytes().problems("a", "Linear", (64, 64), parse_scheme(name))
        assert f"a: bitsandbytes holds nf4 and w8a16, and not {name}" in problem
        assert "Use `scheme: nf4` or `scheme: w8a16, group_size: null`" in problem

    @pytest.mark.parametrize(("group_size", "symmetric"), [(64, True), (None, False)])
    def test_int8_in_groups_or_with_zero_points_is_a_problem_with_a_fix(
        self, group_size: int | None, symmetric: bool
    ) -> None:
        (problem,) = BitsAndBytes().problems("a", "Linear", (64, 64), parse_scheme("w8a16", group_size, symmetric))
        assert (
            "with one scale per output channel and no zero points. Use `group_size: null, symmetric: true`" in problem
        )

    @pytest.mark.parametrize("scheme", [Scheme(NF4), Scheme(INT8)], ids=str)
    def test_a_layer_that_is_no_linear_is_a_problem_with_a_fix(self, scheme: Scheme) -> None:
        (problem,) = BitsAndBytes().problems("h.0.attn.c_attn", "Conv1D", (192, 64), scheme)
        assert "h.0.attn.c_attn is a Conv1D" in problem
        assert BitsAndBytes().problems("a", "Linear", (64, 64), scheme) == []

    @pytest.mark.parametrize(
        ("stages", "form", "message"),
        [
            (["rtn: {scheme: nf4}"], "compressed-tensors", "compressed-tensors has no nf4. Use `checkpoint: {format"),
            (["rtn: {scheme: w4a16, group_size: null}"], "bitsandbytes", "holds nf4 and w8a16, and not w4a16"),
            (["rtn: {scheme: w8a16, group_size: 64}"], "bitsandbytes", "with one scale per output channel"),
            (["rotate: {r4: true}", "rtn: {scheme: nf4}"], "bitsandbytes", "bitsandbytes cannot say that inputs"),
            (["allocate: {bits_per_weight: 4}", "rtn: {scheme: nf4}"], "bitsandbytes", "only integer schemes come in"),
            (
                ["rtn: {scheme: nf4, layers: ['*_proj'], ignore: ['*o_proj']}",
                 "gptq: {scheme: w8a16, group_size: null, layers: ['*o_proj']}"],
                "bitsandbytes", "nf4, w8a16: bitsandbytes holds layers of one scheme in a folder",
            ),
        ],
    )  # fmt: skip
    def test_what_cannot_be_stored_is_refused(self, stages: list[str], form: str, message: str, tiny: Path) -> None:
        text = "".join(["stages:\n", *(f"- {stage}\n" for stage in stages), f"checkpoint: {{format: {form}}}\n"])
        with pytest.raises(RecipeError, match=message):
            prepare(parse(text, "x.yaml"), model=str(tiny))
