"""A report in words and human numbers, the same for the page and the terminal.

What was not measured is left out, never said as zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.core.ggml import types_said
from compress.tables import size

Report = Mapping[str, Any]
"""The keys of report.json, or of one of its parts; no number in it is NaN or infinite."""


def verdict(report: Report) -> str:
    """The run in a sentence, and one more for every text it was scored on."""
    before, after = report["bytes_before"], report["bytes_after"]
    bits = report.get("bits_per_weight")
    told = f" ({bits:.2f} bits per weight in the quantized layers)" if bits else ""
    name, recipe = model_name(report["model"]), report["recipe_name"]
    verb = "shrank" if after < before else "grew"
    return " ".join([f"{recipe} {verb} {name} from {size(before)} to {size(after)}{told}.", *map(said, texts(report))])


def said(text: Report) -> str:
    """One text's scores as a sentence."""
    *others, last = measures(text) or ["nothing finite was measured"]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"On {text['tokens']:,} tokens of {text['name']}: {listed}."


def measures(text: Report) -> list[str]:
    """The scores of one text, a phrase each."""
    phrases = []
    if (perplexity := text.get("perplexity")) is not None:
        original, ratio = text.get("baseline_perplexity"), text.get("perplexity_ratio")
        since = "" if original is None else f"{digits(original)} → "
        factor = "" if ratio is None else f" (×{ratio:.3f})"
        phrases.append(f"perplexity {since}{digits(perplexity)}{factor}")
    if (divergence := text.get("kl_divergence")) is not None:
        phrases.append(f"KL divergence {digits(divergence)}")
    if (agreement := text.get("top1_agreement")) is not None:
        phrases.append(f"the same top token {agreement:.1%} of the time")
    return phrases


def alarms(report: Report) -> list[str]:
    """What did not go as the recipe asked: missed gates, formats that were not written after all, and layers that
    another method had to do."""
    missed = [f"gate {gate['name']}: {gate_said(gate)}" for gate in report.get("gates") or () if gate["met"] is False]
    fallbacks = [f"{layer['name']}: {layer['fallback']}" for _, layer in layers(report) if layer["fallback"]]
    unwritten = [f"{each['format']}: {each['error']}" for each in report.get("exports") or () if each.get("error")]
    return list(dict.fromkeys([*missed, *unwritten, *fallbacks]))


def exported(export: Report) -> str:
    """What has been written in a further format."""
    types = f" ({types_said(export['types'])})" if export.get("types") else ""
    anew = f", {export['requantized']} layers quantized anew{types}" if export["requantized"] else ""
    return f"{export['format']}, {size(export['bytes'])}{anew}"


def gate_said(gate: Report) -> str:
    if gate["value"] is None:
        return f"not measured, limit {gate['limit']:g}"
    return f"{gate['value']:.4g}, limit {gate['limit']:g}, {'met' if gate['met'] else 'not met'}"


def verified(report: Report) -> str:
    """How closely the reloaded checkpoint computes what the run computed; empty where nobody compared."""
    found = report.get("verification") or {}
    if (difference := found.get("max_relative_difference")) is None:
        return ""
    told = f"differ by {difference:.1e} from" if difference else "equal"
    return f"reloaded from disk, its logits {told} those of the run, over {found['tokens']:,} tokens"


def texts(report: Report) -> list[Report]:
    """The texts it was scored on."""
    return (report.get("evaluation") or {}).get("texts") or []


def layers(report: Report) -> Iterator[tuple[str, Report]]:
    """Every layer that a stage worked on, with the stage's name."""
    for stage in report["stages"]:
        for layer in stage["layers"]:
            yield stage["name"], layer


def model_name(model: str) -> str:
    """A folder's last part; `owner/name` for a snapshot in the hub's cache."""
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", model)
    return f"{cached[1]}/{cached[2]}" if cached else Path(model).name or model


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Names that tell models apart: folders' last parts, or more of them where those are alike."""
    names = {model: model_name(model) for model in models}
    return {model: model if list(names.values()).count(name) > 1 else name for model, name in names.items()}


def shared_beginning(names: Sequence[str]) -> str:
    """What all of several names begin with, up to where a word ends; nothing, where that is all of one."""
    shared = names[0][: num_shared(*names)] if len(names) > 1 else ""
    beginning = shared[: 1 + max(shared.rfind(end) for end in "-_./ ")]
    return "" if beginning in names else beginning


def num_shared(*texts: str) -> int:
    """How many characters all of them begin with."""
    return sum(1 for _ in takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False)))


def digits(value: float, significant: int = 3) -> str:
    """In plain notation and without false precision: `1,204`, `73.2`, `0.0031`; tiny ones as `2.1e-06`."""
    if 0 < abs(value) < 1e-5:
        return f"{value:.1e}"
    rounded = float(f"{value:.{significant - 1}e}")
    places = significant - 1 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{value:,.{max(places, 0)}f}"


SCORES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens": ("tokens", "{:,}".format),
    "context": ("window", "{:,}".format),
    "baseline_perplexity": ("original's perplexity", "{:.3f}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "perplexity_ratio": ("ratio", "{:.4f}".format),
    "kl_divergence": ("KL divergence", digits),
    "top1_agreement": ("same top token", "{:.1%}".format),
}
"""What tables show of a text's scores: a column's name, and how its numbers are written."""


def percent(share: float | None) -> str:
    """Two significant digits of a share; empty for None."""
    return "" if share is None else f"{digits(100 * share, 2)}%"


def finite(value: Any) -> Any:
    """A copy of plain data in which every number that is not finite is None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
