"""The page of a comparison in words: what it says, and what it leaves unsaid."""

from __future__ import annotations

import re
from typing import Any

import pytest

from compress.report import render_comparison, render_scores
from compress.report.intervals import Interval, intervals
from compress.report.scatter import Dot, scatter
from compress.report.words import names_of, shared_beginning


def written(page: str) -> str:
    """The text of a page."""
    return re.sub(r"<[^>]*>", "", page.split("<main>")[1].split("<script>")[0])


def test_the_page_opens_with_what_nothing_beats(comparison: dict[str, Any]) -> None:
    assert (
        "9 models from 9.3 MB to 25.2 MB. Nothing beats w2, w3, w4-gptq, nf4, w8 and the original in both size and KL "
        "divergence on test.jsonl."
    ) in written(render_comparison(comparison))


def test_a_model_that_failed_is_named_at_the_top_and_is_in_no_table(comparison: dict[str, Any]) -> None:
    page = render_comparison(comparison)
    top, rest = page.split("<section>", 1)
    assert "w1 was not scored: /models/llama-w1/model.safetensors: holds a weight that is not finite" in top
    assert ">w1<" not in rest


def test_each_text_has_a_chart_of_all_models_and_a_table_of_them(comparison: dict[str, Any]) -> None:
    page = render_comparison(comparison)
    assert [page.count(f"<h2>KL divergence on {text}</h2>") for text in ("test.jsonl", "wikitext.txt")] == [1, 1]
    assert page.count('<g class="best">') == 2 * 6
    assert page.count('<g class="beaten">') == 2 * 3
    assert page.count("<td>nf4</td>") == 2 + 5 + 1  # texts, tasks, samples


def test_the_shrink_of_errors_is_beside_the_difference(comparison: dict[str, Any]) -> None:
    page = render_scores({"baseline": comparison["baseline"], **comparison["models"][0]})
    assert page.count('class="narrow"') == page.count('class="wide"') == 5
    narrow, wide = (float(re.search(rf'class="{kind}".*?width="([\d.]+)"', page)[1]) for kind in ("narrow", "wide"))
    assert narrow / wide == pytest.approx(0.0107 / 0.0433, rel=0.01)
    assert "0.7500 ± 0.0306" in page
    assert "7 of 200" in page


def test_a_text_is_marked_where_it_parts_from_the_originals(comparison: dict[str, Any]) -> None:
    page = render_scores({"baseline": comparison["baseline"], **comparison["models"][0]})
    shared = " The carver looks at "
    assert f"<span>{shared}</span><mark>the block" in page
    assert f"<span>{shared}</span><mark>, then it went another way &lt;b&gt;&amp;</mark>" in page
    assert "5 tokens in common" in page


def test_a_text_that_is_the_originals_has_no_mark(comparison: dict[str, Any]) -> None:
    row = comparison["models"][0]
    row["generation"]["samples"] = [{"prompt": "a", "text": "same", "baseline_text": "same", "divergence_point": None}]
    page = render_scores({"baseline": comparison["baseline"], **row})
    assert "<small>the same</small>" in page
    assert "<mark>" not in page


def test_without_a_baseline_models_are_compared_by_perplexity(comparison: dict[str, Any]) -> None:
    page = render_comparison({**comparison, "baseline": None})
    assert "<h2>perplexity on test.jsonl</h2>" in page
    assert "<h1>10 checkpoints</h1>" in page


def test_without_texts_the_charts_are_those_of_tasks(comparison: dict[str, Any]) -> None:
    for row in comparison["models"]:
        row["texts"] = []
    page = render_comparison(comparison)
    assert "<h2>acc on npi_present</h2>" in page
    assert "acc, higher is better" in page


def test_where_all_failed_there_is_no_chart(comparison: dict[str, Any]) -> None:
    page = render_comparison({**comparison, "models": comparison["models"][-1:], "pareto": []})
    assert '<svg class="chart"' not in page
    assert "was not scored" in page


def test_names_lose_what_all_of_them_begin_with_but_never_everything() -> None:
    assert shared_beginning(["llama-3.2-w4-gptq", "llama-3.2-w4-awq"]) == "llama-3.2-w4-"
    assert shared_beginning(["llama-w4", "llama-"]) == ""
    assert shared_beginning(["nf4"]) == shared_beginning(["w4", "nf4"]) == ""


def test_folders_of_the_same_name_are_told_apart_by_their_paths() -> None:
    assert names_of(["a/out", "b/out", "c/small"]) == {"a/out": "a/out", "b/out": "b/out", "c/small": "small"}


# ---- charts


def test_a_lossless_model_has_a_place_on_a_logarithmic_axis() -> None:
    dots = [
        Dot(10e6, 0.01, "w3", "w3", best=True),
        Dot(12e6, 0.0001, "w8", "w8"),
        Dot(25e6, 0.0, "original", "original"),
    ]
    drawn = scatter(dots, "size", "loss", str)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert len(heights) == 3
    assert "nan" not in drawn
    assert max(heights) > sorted(heights)[1] + 20


def test_an_error_bar_spans_twice_the_standard_error() -> None:
    dots = [Dot(10.0, 2.0, "a", "a", error=0.5), Dot(11.0, 3.0, "b", "b")]
    drawn = scatter(dots, "size", "loss", str)
    top, bottom = map(float, re.search(r'class="error" d="M[\d.]+ ([\d.]+)h8m-4 0V([\d.]+)', drawn).groups())
    middle, other = (float(y) for y in re.findall(r'cy="([\d.]+)"', drawn))
    assert middle - top == pytest.approx(bottom - middle, abs=0.11)
    assert bottom - top == pytest.approx(middle - other, abs=0.21)


def test_zero_is_in_every_chart_of_differences() -> None:
    drawn = intervals([Interval("task", 0.3, 0.01, 0.02, "task")], "difference")
    assert 'class="zero"' in drawn
    assert ">0</text>" in drawn
