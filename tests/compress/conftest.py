"""A comparison as `netsuke compare` prints it, with all that one can have."""

from __future__ import annotations

from typing import Any

import pytest

MODELS = {
    "w2": (9.3, 0.0664), "w3": (10.0, 0.0151), "w3-gptq": (10.0, 0.0154), "w4": (11.2, 0.00359),
    "w4-awq": (11.2, 0.00355), "w4-gptq": (11.2, 0.00336), "nf4": (11.6, 0.00291), "w8": (15.8, 0.0000199),
}  # fmt: skip
"""Endings of names: megabytes and divergence."""
TASKS = ("anaphor_agreement", "determiner_noun_agreement_with_adj_irregular_1", "npi_present", "transitive", "wh_gap")
WRITTEN = "The carver looks at the block for a long while, for every detail must be there before the first cut."


@pytest.fixture
def comparison() -> dict[str, Any]:
    """Eight checkpoints and their original, on two texts and five tasks, and one that failed."""
    rows = [_row(f"/models/llama-{name}", *known, place) for place, (name, known) in enumerate(MODELS.items())]
    original = _row("/models/llama", 25.2, 0.0, len(rows))
    failed = {"model": "/models/llama-w1", "bytes": 9_000_000, "format": None, "texts": [], "tasks": {}}
    failed["error"] = "/models/llama-w1/model.safetensors: holds a weight that is not finite"
    front = [f"/models/llama{name}" for name in ("-w2", "-w3", "-w4-gptq", "-nf4", "-w8", "")]
    return {"baseline": "/models/llama", "models": [*rows, original, failed], "pareto": front}


def _row(model: str, megabytes: float, divergence: float, place: int) -> dict[str, Any]:
    texts = [
        {
            "name": name,
            "perplexity": 54.3 * (1 + divergence),
            "baseline_perplexity": 54.3,
            "perplexity_ratio": 1 + divergence,
            "perplexity_ratio_standard_error": divergence / 9,
            "kl_divergence": divergence * factor,
            "kl_standard_error": divergence * factor / 4,
            "top1_agreement": 1 - divergence,
            "tokens": 49056,
            "context": 512,
        }
        for name, factor in (("test.jsonl", 1.0), ("wikitext.txt", 1.7))
    ]
    tasks = {
        name: {
            "acc": 0.75 - (place + column) / 100,
            "acc_stderr": 0.0306,
            "baseline_acc": 0.75,
            "acc_difference": -(place + column) / 100,
            "acc_difference_stderr": 0.0107,
            "acc_difference_stderr_unpaired": 0.0433,
            "flips": 7 + place,
            "flips_to_wrong": 5,
            "questions": 200,
        }
        for column, name in enumerate(TASKS)
    }
    samples = [
        {
            "prompt": prompt,
            "text": f" {WRITTEN[: 20 + place]}, then it went another way <b>&",
            "baseline_text": f" {WRITTEN}",
            "divergence_point": 5,
        }
        for prompt in ("A netsuke", "Boxwood", "Ivory", "Horn", "Amber", "Bamboo", "A walnut")
    ]
    generation = {
        "repetition": 0.12,
        "baseline_repetition": 0.11,
        "loops": 0.25,
        "baseline_loops": 0.0,
        "divergence_point": 5.0,
        "identical": 0.0,
    }
    return {
        "model": model,
        "bytes": round(megabytes * 1e6),
        "bits_per_weight": megabytes / 3,
        "format": "compressed-tensors",
        "texts": texts,
        "tasks": tasks,
        "generation": generation | {"samples": samples},
    }
