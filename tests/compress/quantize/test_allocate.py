"""Mixed precision, from a recipe: the budget holds, fused layers agree, and the choice is no worse than uniform."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.errors import RecipeError
from compress.pipeline import prepare
from compress.quantize.allocate import Allocate
from compress.recipe import Recipe, parse


def recipe(budget: float = 3.9, *, choices: str = "[2, 3, 4, 8]", quantizer: str = "rtn: {scheme: w4a16}") -> Recipe:
    quantizer = quantizer.replace("w4a16", "w4a16, group_size: 32")
    head = "calibration: {samples: 8, sequence_length: 32}\nevaluation: {samples: 4}\n"
    stages = f"stages:\n  - allocate: {{bits_per_weight: {budget}, choices: {choices}, samples: 4}}\n  - {quantizer}\n"
    return parse(head + stages, "x.yaml")


@pytest.fixture(scope="module")
def report(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("mixed") / "out"
    return compress.run(recipe(), model=str(tiny), output=output, calibration=str(text)) | {"folder": output}


def test_the_budget_is_kept_and_used(report: dict[str, Any]) -> None:
    assert 3.5 < report["bits_per_weight"] <= 3.9


def test_layers_that_run_as_one_have_the_same_bits(report: dict[str, Any]) -> None:
    bits = report["allocation"]["bits"]
    for block in range(3):
        attention = {bits[f"model.layers.{block}.self_attn.{name}_proj"] for name in "qkv"}
        gated = {bits[f"model.layers.{block}.mlp.{name}_proj"] for name in ("gate", "up")}
        assert len(attention) == len(gated) == 1


def test_layers_are_quantized_with_the_bits_that_were_decided(report: dict[str, Any]) -> None:
    schemes = {layer["name"]: layer["scheme"] for stage in report["stages"] for layer in stage["layers"]}
    assert schemes == {name: f"w{bits}a16" for name, bits in report["allocation"]["bits"].items()}
    assert len(set(schemes.values())) > 1


def test_what_is_taken_loses_no_more_than_the_uniform_choice(report: dict[str, Any]) -> None:
    found = report["allocation"]
    assert found["measured"][found["taken"]] == min(found["measured"].values())
    assert set(found["measured"]) == {"allocated", "uniform"}


def test_the_frontier_falls_from_the_smallest_to_the_largest(report: dict[str, Any]) -> None:
    sizes, costs = zip(*report["allocation"]["frontier"], strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(costs) == sorted(costs, reverse=True)


def test_the_report_shows_the_trade_off(report: dict[str, Any]) -> None:
    page = (report["folder"] / "report.html").read_text()
    assert 'class="chart"' in page
    assert "4 bits throughout" in page


def test_a_resumed_run_does_not_decide_again(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.pipeline.job import Job

    def stop(self: Job) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Job, "walk", stop)
        with pytest.raises(KeyboardInterrupt):
            compress.run(recipe(), model=str(tiny), output=tmp_path / "out", calibration=str(text))
    manifest = json.loads((tmp_path / "out.partial/.netsuke/manifest.json").read_text())
    monkeypatch.setattr(Allocate, "decide", lambda *_: pytest.fail("decided again"))
    report = compress.run(recipe(), model=str(tiny), output=tmp_path / "out", calibration=str(text), resume=True)
    assert report["allocation"]["bits"] == manifest["facts"]["allocation"]["bits"]


def test_the_plan_promises_no_more_than_the_budget(tiny: Path, text: Path) -> None:
    plan = prepare(recipe(), model=str(tiny), calibration=str(text))
    assert plan.bits_per_weight <= 3.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: recipe(2.0), r"x\.yaml:4:\d+: bits_per_weight=2.0 is less than the 2\.\d+ that the smallest choice"),
        (lambda: recipe(quantizer="rtn: {scheme: fp8}"), "only integer schemes come in several widths"),
        (lambda: recipe(quantizer="rtn: {scheme: w4a16, symmetric: false}"), "several grids in one folder"),
        (lambda: recipe(choices="[4]"), r"x\.yaml:4:\d+: .*two or more different numbers of bits"),
        (lambda: recipe(choices="[3, 9]"), "two or more different numbers of bits from 2 to 8"),
    ],
)
def test_what_cannot_be_decided_is_refused(given: Any, message: str, tiny: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(given(), model=str(tiny), calibration=str(text))


def test_an_allocator_needs_a_quantizer_behind_it(tiny: Path, text: Path) -> None:
    alone = parse("stages:\n  - allocate: {bits_per_weight: 4}\n", "x.yaml")
    with pytest.raises(RecipeError, match="put rtn or gptq after it"):
        prepare(alone, model=str(tiny), calibration=str(text))
