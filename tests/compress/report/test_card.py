"""The model card: what it says, to whom, and what it leaves out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.report.card import card, original_of, read, write
from compress.report.words import Report

ORIGINAL = """---
license: llama3.2
license_name: a licence
language: [en, de]
tags: [pytorch]
pipeline_tag: text-generation
---
# The model

Text with `code`, | and <b>HTML</b>.
"""


def report(**changed: Any) -> dict[str, Any]:
    """A run of two layers, scored on one text."""
    recipe = {
        "name": "w4a16-gptq",
        "stages": [{"smoothquant": {"alpha": 0.5}}, {"gptq": {"scheme": "w4a16", "layers": ["re:.*proj"]}}],
        "calibration": {"dataset": "/home/carver/secret/text.jsonl", "samples": 4},
        "evaluation": {"text": ["~/held/out.txt"]},
        "checkpoint": {"format": "compressed-tensors", "also": ["gptq", "gguf-q4_k"]},
        "model": "/models/owner",
        "output": "/models/out",
    }
    layers = [
        {"name": f"model.layers.{index}.mlp.up_proj", "scheme": "w4a16", "error": 0.1, "fallback": None}
        for index in (0, 1)
    ]
    return {
        "recipe": yaml.safe_dump(recipe, sort_keys=False),
        "recipe_name": "w4a16-gptq",
        "model": "/cache/models--owner--name/snapshots/0123abc",
        "stages": [{"name": "smoothquant", "layers": []}, {"name": "gptq", "layers": layers}],
        "bytes_before": 25_200_000,
        "bytes_after": 11_200_000,
        "bits_per_weight": 4.125,
        "calibration": {
            "dataset": "/home/carver/secret/text.jsonl",
            "tokens": 65536,
            "windows": 32,
            "sequence_length": 2048,
            "hash": "0f1e",
        },
        "evaluation": {
            "texts": [
                {
                    "name": "out.txt",
                    "tokens": 16352,
                    "context": 2048,
                    "baseline_perplexity": 73.161,
                    "perplexity": 73.481,
                    "perplexity_ratio": 1.00437,
                    "kl_divergence": 0.003104,
                    "top1_agreement": 0.9512,
                }
            ]
        },
        "gates": [],
        "verification": {"max_relative_difference": 0.0, "tokens": 64},
        "versions": {"netsuke": "0.1.0", "torch": "2.13.0"},
        "notes": ["lm_head stays_as it is"],
        "generates": True,
        "engines": ["vllm", "transformers"],
        "exports": [
            {"format": "gptq", "output": "/models/out.gptq", "bytes": 11_300_000, "exact": 2, "requantized": 0},
            {"format": "awq", "output": "/models/out.awq", "bytes": 12_300_000, "exact": 0, "requantized": 2},
        ],
        **changed,
    }


def front(text: str) -> dict[str, Any]:
    """The front matter, as the hub reads it."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_the_front_matter_says_of_what_it_was_made_and_how() -> None:
    assert front(card(report())) == {
        "base_model": "owner/name",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["netsuke", "compressed-tensors", "smoothquant", "gptq", "w4a16", "4-bit"],
    }


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [("fp8-static", ["fp8-static", "8-bit"]), ("nvfp4", ["nvfp4", "4-bit"]), ("nf4", ["nf4", "4-bit"]), ("2:4", [])],
)
def test_a_scheme_is_a_tag_and_so_are_its_bits(scheme: str, tags: list[str]) -> None:
    layer = {"name": "a", "scheme": scheme, "error": 0.0, "fallback": None}
    found = front(card(report(stages=[{"name": "gptq", "layers": [layer]}])))
    assert found["tags"][4:] == tags
    assert ("base_model_relation" in found) == bool(tags)


def test_scores_stand_with_their_text_and_none_is_made_up() -> None:
    (row,) = [line for line in card(report()).splitlines() if line.startswith("| `out.txt`")]
    assert row == "| `out.txt` | 16,352 | 2,048 | 73.161 | 73.481 | 1.0044 | 0.00310 | 95.1% |"
    alone = report()
    del alone["evaluation"]["texts"][0]["kl_divergence"]
    assert "| 1.0044 |  | 95.1% |" in card(alone)
    unscored = card(report(evaluation=None, evaluation_note="no text to score on"))
    assert "Not scored: no text to score on." in unscored
    assert "perplexity" not in unscored
    assert "## Scores" not in card(report(evaluation=None))


def test_what_did_not_go_as_asked_is_said() -> None:
    gate = {"name": "max_perplexity_ratio", "limit": 1.0, "value": 1.00437, "met": False}
    assert "- gate max\\_perplexity\\_ratio: 1.004, limit 1, not met" in card(report(gates=[gate]))


def test_programs_are_named_that_read_the_folder_and_no_others() -> None:
    assert [line for line in section(card(report()), "Use").splitlines() if line.endswith(":")] == [
        "transformers, with compressed-tensors installed, or after `import compress`:",
        "vLLM:",
        "netsuke:",
    ]
    alone = section(card(report(engines=[])), "Use")
    assert "transformers" not in alone
    assert 'compress.load("FOLDER")' in alone
    encoder = section(card(report(generates=False)), "Use")
    assert "import AutoModel\n" in encoder
    assert "vllm" not in encoder


def test_a_further_format_has_its_own_words_and_the_scores_of_its_codes() -> None:
    text = card(report(), "gptq")
    assert front(text)["tags"][:2] == ["netsuke", "gptq"]
    assert "25.2 MB → 11.3 MB. Format: gptq; the codes are those that were scored." in text
    assert "with optimum and gptqmodel installed" in text
    assert "| `out.txt` |" in text


def test_scores_are_not_claimed_for_layers_that_were_quantized_anew() -> None:
    text = card(report(), "awq")
    assert "2 layers were quantized anew for it" in text
    assert "Not scored in this format." in text
    assert "73.481" not in text


def test_netsuke_is_offered_in_the_place_of_a_package_where_it_steps_in() -> None:
    exports = [{"format": name, "bytes": 1} for name in ("bitsandbytes", "dense")]
    assert "transformers, with bitsandbytes installed:" in card(report(exports=exports), "bitsandbytes")
    assert "\ntransformers:" in card(report(exports=exports), "dense")


def test_a_graph_is_opened_by_its_own_library() -> None:
    text = card(report(exports=[{"format": "openvino", "bytes": 1}]), "openvino")
    assert front(text)["library_name"] == "openvino"
    assert "compile_model" in section(text, "Use")
    assert "compress.load" not in text


def test_paths_of_this_machine_are_left_out() -> None:
    text = card(report())
    assert "`text.jsonl`, 65,536 tokens in windows of 2,048" in text
    for place in ("/home", "carver", "secret", "/models", "/work", "~", "/cache", "snapshots"):
        assert place not in text
    told = yaml.safe_load(section(text, "How it was made").partition("```yaml\n")[2].partition("\n```")[0])
    assert told["calibration"]["dataset"] == "text.jsonl"
    assert told["evaluation"]["text"] == ["out.txt"]
    assert told["stages"][1]["gptq"]["layers"] == ["re:.*proj"]


def test_the_originals_licence_goes_into_the_front_matter_and_its_text_to_the_end() -> None:
    text = card(report(), original=ORIGINAL)
    assert front(text) == front(card(report())) | {
        "license": "llama3.2",
        "license_name": "a licence",
        "language": ["en", "de"],
    }
    assert text.endswith("## The original's card\n\n# The model\n\nText with `code`, | and <b>HTML</b>.\n")


@pytest.mark.parametrize(
    "original",
    [
        "",
        "No front matter",
        "---\n: [broken\n---\ntext",
        "---\nlist\n---\n",
        "---\n",
        "\ufeff---\r\nlicense: mit\r\n---\r\nA",
    ],
)
def test_any_original_gives_a_card(original: str) -> None:
    found = front(card(report(), original=original))
    assert found["base_model"] == "owner/name"
    assert ("license" in found) == ("mit" in original)


def test_a_conversion_hands_on_the_originals_card_and_not_ours() -> None:
    ours = card(report(), original=ORIGINAL)
    assert card(report(), "gptq", original_of(ours)) == card(report(), "gptq", ORIGINAL)
    assert "The original's card" not in card(report(), "gptq", original_of(card(report())))


HOSTILE = [
    "name\n---\nlicense: mit",
    "`code` | cell | <script>alert(1)</script>",
    "![x](javascript:alert(1)) **bold** #heading",
    "'quotes' \"and\": {braces: [1]} # comment",
    "```\n## Use",
    "&amp; \\ back\\slash $x$",
    "émoji 🪵 ‮gnirts",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_can_break_out_of_its_place(name: str) -> None:
    scored: Report = report()["evaluation"]["texts"][0]
    changed = report(
        model=f"models--owner--{name}/snapshots/0" if "/" not in name else name,
        recipe_name=name,
        notes=[name],
        evaluation={"texts": [{**scored, "name": name}]},
        recipe=yaml.safe_dump({**yaml.safe_load(report()["recipe"]), "name": name}),
    )
    text, plain = card(changed), card(report())
    found = front(text)
    assert found.keys() == front(plain).keys()
    assert found["tags"] == front(plain)["tags"]

    def outside_code(card: str) -> str:
        return re.sub(r"(`+).*?[^`]\1(?!`)", "", card.partition("\n---\n")[2], flags=re.DOTALL)

    assert (
        re.findall(r"^#+ .*?[,\n]", outside_code(text), re.MULTILINE)[1:]
        == re.findall(r"^#+ .*?[,\n]", outside_code(plain), re.MULTILINE)[1:]
    )
    assert not re.search(r"(?<!\\)[<>]|(?<!\\)\]\(", outside_code(text))
    (row,) = [line for line in text.splitlines() if line.startswith("| `") and "16,352" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 9


def test_it_is_written_and_read_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path) == ""
    write(report(), tmp_path, ORIGINAL)
    assert read(tmp_path) == card(report(), original=ORIGINAL)
