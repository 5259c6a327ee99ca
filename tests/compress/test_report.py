from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compress.report import finite, render, render_scores, summary_lines, write
from compress.report.page import Number, Square, heat_map, table
from compress.report.words import digits, model_name, verdict

ROLES = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
FALLBACK = "damping raised from 0.01 to 0.1: the Hessian was not positive definite"
VOID = {"meta", "link", "br", "img", "rect", "circle"}


def sample() -> dict[str, Any]:
    """A run of six blocks as the pipeline reports it: the worst layer is a down projection that fell back."""
    layers = [
        {
            "name": f"model.layers.{block}.{name}",
            "scheme": "w4a16",
            "error": 0.0011 * 1.45**block * (1.7 if role in ("attn.o", "mlp.down") else 1.0 + len(role) / 20),
            "fallback": None,
        }
        for block in range(6)
        for name, role in ROLES.items()
    ]
    layers[-1]["fallback"] = FALLBACK
    text = {
        "name": "held-out calibration text",
        "perplexity": 73.481,
        "baseline_perplexity": 73.161,
        "perplexity_ratio": 1.00437,
        "kl_divergence": 0.003104,
        "top1_agreement": 0.9512,
        "tokens": 16352,
        "context": 512,
    }
    return {
        "recipe": "name: w4a16-gptq\nstages:\n- gptq:\n    scheme: w4a16\n    group_size: 128\n",
        "recipe_name": "w4a16-gptq",
        "model": "/models/pocket-llama-13m",
        "stages": [{"name": "gptq", "seconds": 141.2, "layers": layers}],
        "bytes_before": 25_700_000,
        "bytes_after": 12_110_000,
        "bits_per_weight": 4.63,
        "calibration": {
            "dataset": "data/calibration.jsonl",
            "tokens": 131072,
            "windows": 256,
            "sequence_length": 512,
            "hash": "5f3c2e9b7a10",
        },
        "peak_memory_bytes": 1_234_000_000,
        "seconds": 200.4,
        "versions": {"python": "3.11.7", "netsuke": "0.1.0", "torch": "2.13.0"},
        "evaluation": {"model": "out", "baseline": "/models/pocket-llama-13m", "texts": [text], "tasks": {}},
        "evaluation_note": "",
        "gates": [{"name": "max_perplexity_ratio", "limit": 1.05, "value": 1.00437, "met": True}],
        "verification": {"max_relative_difference": 2.1e-06, "tokens": 512},
        "notes": ["lm_head is tied to model.embed_tokens and stays"],
        "roles": {f"model.layers.{block}.{name}": role for block in range(6) for name, role in ROLES.items()},
        "block_of": {f"model.layers.{block}.{name}": block for block in range(6) for name in ROLES},
    }


class Document(HTMLParser):
    """What a browser would find: the tags, the text, and whether every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.misnested: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and self.open.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def without(*keys: str) -> dict[str, Any]:
    """The sample with nothing under `keys`."""
    return {**sample(), **dict.fromkeys(keys)}


# ---- the page


def test_the_page_closes_every_tag_in_order() -> None:
    document = Document(render(sample()))
    assert (document.open, document.misnested) == ([], [])


def test_the_page_fetches_nothing() -> None:
    page = render(sample())
    assert not {"src", "href", "srcset"} & {name for _, attributes in Document(page).tags for name in attributes}
    assert not any(word in page for word in ("http:", "https:", "url(", "@import"))


def test_the_page_opens_with_the_verdict() -> None:
    assert (
        "w4a16-gptq shrank pocket-llama-13m from 25.7 MB to 12.1 MB (4.63 bits per weight in the quantized layers). "
        "On 16,352 tokens of held-out calibration text: perplexity 73.2 → 73.5 (×1.004), KL divergence 0.00310 "
        "and the same top token 95.1% of the time."
    ) in Document(render(sample())).text


@pytest.mark.parametrize("key", ["model", "recipe", "recipe_name"])
def test_text_from_the_run_is_escaped(key: str) -> None:
    page = render({**sample(), key: "<script>alert('&')"})
    assert Document(page).count("script") == 1
    assert "<script>alert('&')" in Document(page).text


def test_a_layers_name_is_escaped_in_the_heat_map_and_in_the_table() -> None:
    hostile = '"><b>&'
    report = sample()
    report["stages"][0]["layers"][0]["name"] = hostile
    report["roles"][hostile], report["block_of"][hostile] = "attn.q", 0
    document = Document(render(report))
    assert document.count("b") == 0
    assert document.text.count(hostile) == 2


def test_every_layer_of_a_block_is_a_square_of_the_heat_map_and_a_row_of_the_table() -> None:
    document = Document(render(sample()))
    squares = [attributes for tag, attributes in document.tags if tag == "rect" and "fill-opacity" in attributes]
    assert len(squares) == 42
    assert "All 42 layers" in document.text


def test_a_fallback_is_named_once_at_the_top_and_marked_in_the_map_and_in_the_table() -> None:
    page = render(sample())
    top = page[: page.index("<section>")]
    assert top.count(FALLBACK) == 1
    assert page.count('<tr class="marked">') == 1
    assert page.count('<g class="marked') == 1


def test_a_gate_that_was_missed_is_named_at_the_top() -> None:
    gate = {"name": "max_kl_divergence", "limit": 0.001, "value": 0.0031, "met": False}
    page = render({**sample(), "gates": [gate]})
    assert "gate max_kl_divergence: 0.0031, limit 0.001, not met" in page[: page.index("<section>")]


def test_of_several_layers_of_one_role_in_a_block_the_map_shows_the_worst() -> None:
    report = sample()
    for expert in range(3):
        name = f"model.layers.0.mlp.experts.{expert}"
        report["stages"][0]["layers"].append(
            {"name": name, "scheme": "w4a16", "error": 0.1 * (expert == 1), "fallback": None}
        )
        report["roles"][name], report["block_of"][name] = "expert", 0
    page = render(report)
    assert "<title>model.layers.0.mlp.experts.1 · w4a16 · 10%</title>" in page
    assert "<title>model.layers.0.mlp.experts.0" not in page


def test_what_was_not_measured_has_no_section() -> None:
    headings = ("Scores", "Gates", "Tasks")
    page = render({**without("evaluation", "calibration", "verification"), "gates": []})
    assert not any(f"<h2>{heading}</h2>" in page for heading in headings)
    assert "None" not in Document(page).text


def test_a_run_without_scores_says_why() -> None:
    assert "Not scored: no text to score on" in render(
        {**without("evaluation"), "evaluation_note": "no text to score on"}
    )


def test_two_stages_have_two_heat_maps_and_are_told_apart() -> None:
    report = sample()
    report["stages"].insert(0, {**report["stages"][0], "name": "awq"})
    document = Document(render(report))
    assert document.count("svg") == 3
    assert "stage" in document.text


def test_segments_have_their_shapes_and_trainings_their_curves() -> None:
    curve = [{"step": step, "loss": 0.5 / (step + 1), "held_out": 0.4 / (step + 1)} for step in range(4)]
    segments = [
        {"stage": "depth", "parameters": 900, "bytes": 1800, "removed": [3, "4.mlp"], "notes": ["expert 2 saw little"]},
        {
            "stage": "distill", "parameters": 900, "bytes": 1800, "curve": curve, "best_step": 3, "steps": 3,
            "tokens": 4096, "stopped_early": True,
        },
    ]  # fmt: skip
    shown = Document(render(sample() | {"segments": segments, "parameters_before": 1000, "parameters_after": 900}))
    assert not shown.open
    assert "without block 3, 4.mlp" in shown.text
    assert "depth: expert 2 saw little" in shown.text
    assert "held-out loss 0.400 → 0.100 at step 3 of 3, over 4,096 tokens; it ended early" in shown.text
    assert "Training" not in Document(render(sample())).text


def test_scores_alone_make_a_page() -> None:
    result = {**sample()["evaluation"], "tasks": {"blimp": {"acc": 0.71, "stderr": 0.014}}}
    document = Document(render_scores(result))
    assert (document.open, document.misnested) == ([], [])
    assert "against pocket-llama-13m" in document.text
    assert "0.0140" in document.text


# ---- elements


def test_a_greater_error_is_a_deeper_square() -> None:
    row = {block: Square(error, "", "") for block, error in enumerate([0.01, 0.1, 0.001])}
    tags = Document(heat_map({"attn.q": row}, "block")).tags
    middling, deepest, lightest = (float(attributes["fill-opacity"] or "") for tag, attributes in tags if tag == "rect")
    assert lightest < middling < deepest
    assert math.isclose(middling, (lightest + deepest) / 2, abs_tol=1e-3)


def test_errors_that_hardly_differ_look_alike() -> None:
    row = {block: Square(error, "", "") for block, error in enumerate([0.0100, 0.0105])}
    tags = Document(heat_map({"attn.q": row}, "block")).tags
    shades = [float(attributes["fill-opacity"] or "") for tag, attributes in tags if tag == "rect"]
    assert shades[1] - shades[0] < 0.05


@pytest.mark.parametrize("error", [0.0, None, 1e-9])
def test_a_map_of_one_value_can_be_drawn(error: float | None) -> None:
    assert Document(heat_map({"attn.q": {3: Square(error, "", "")}}, "block")).count("rect") == 1


def test_a_table_leaves_out_columns_that_say_nothing() -> None:
    page = table(["name", "empty", "number"], [["a", None, Number(1.5, "1.5")], ["b", "", Number(None, "")]])
    assert "empty" not in page
    assert page.count("data-key") == 1


# ---- files and words


def test_the_json_file_keeps_the_order_and_turns_what_is_not_finite_into_null(tmp_path: Path) -> None:
    report = {**sample(), "bits_per_weight": math.nan}
    report["stages"][0]["layers"][0]["error"] = math.inf
    write(report, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert list(read) == list(report)
    assert read["bits_per_weight"] is None
    assert read["stages"][0]["layers"][0]["error"] is None


def test_the_html_file_does_not_show_what_is_not_finite(tmp_path: Path) -> None:
    report = sample()
    report["evaluation"]["texts"][0]["perplexity_ratio"] = math.nan
    report["stages"][0]["layers"][0]["error"] = math.nan
    write(report, tmp_path)
    assert "nan" not in Document((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_finite_leaves_its_argument_alone() -> None:
    value = {"a": [math.nan, 1.0]}
    assert finite(value) == {"a": [None, 1.0]}
    assert math.isnan(value["a"][0])


def test_the_terminal_gets_human_numbers() -> None:
    lines = dict(summary_lines(sample()))
    assert lines["size"] == "25.7 MB → 12.1 MB (47%)"
    assert lines["time"] == "3 m 20 s"
    assert lines["gate max_perplexity_ratio"] == "1.004, limit 1.05, met"
    assert lines["note"] == "lm_head is tied to model.embed_tokens and stays"
    assert lines["warning"] == f"model.layers.5.mlp.down_proj: {FALLBACK}"


def test_a_long_list_of_warnings_folds_its_end_away() -> None:
    gates = [{"name": f"warning {index}", "limit": 1.0, "value": 2.0, "met": False} for index in range(20)]
    page = render({**sample(), "stages": [], "gates": gates})
    assert "14 more</summary>" in page
    assert all(f"<li>gate warning {index}: 2, limit 1, not met</li>" in page for index in range(20))


def test_a_checkpoint_that_computes_the_same_is_said_to() -> None:
    exact = {"max_relative_difference": 0.0, "tokens": 256}
    assert dict(summary_lines({**sample(), "verification": exact}))["verified"] == (
        "reloaded from disk, its logits equal those of the run, over 256 tokens"
    )


def test_a_checkpoint_that_grew_is_not_said_to_have_shrunk() -> None:
    assert "grew pocket-llama-13m from" in verdict({**sample(), "bytes_after": 30_000_000})


def test_a_hub_snapshot_is_called_by_its_id() -> None:
    assert model_name("/cache/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de36") == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (0.9996, "1.00"), (1204.4, "1,204"), (73.161, "73.2"), (0.0031042, "0.00310"), (2.1e-6, "2.1e-06")],
)
def test_numbers_have_three_significant_digits(value: float, said: str) -> None:
    assert digits(value) == said
