"""What an architecture is, as data: one file per family, one line per name in `FAMILIES`.

`anatomy_for` answers from `config.json` and tensor shapes alone, without torch, so that planning is quick. A
family in the table is described by hand and verified by tests; any other is worked out from its names by
`detect`, which says what it concluded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.errors import ModelError
from compress.models.anatomy import Anatomy, Site
from compress.models.bert import BERT
from compress.models.detect import detect
from compress.models.gemma import GEMMA, GEMMA2
from compress.models.gpt2 import GPT2
from compress.models.gpt_neox import GPT_NEOX
from compress.models.llama import LLAMA
from compress.models.mixtral import MIXTRAL, QWEN3_MOE
from compress.models.olmo2 import OLMO2
from compress.models.opt import OPT
from compress.models.phi3 import PHI3

FAMILIES: dict[str, Anatomy] = {
    "bert": BERT,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "granite": LLAMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "smollm3": LLAMA,
}
"""`model_type` of config.json → anatomy."""


def anatomy_for(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    """The anatomy of a model folder: by its `model_type` where the family is known, from its names elsewhere.

    Raises ModelError where the tensors are not those of the family, or show no transformer blocks.
    """
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        return detect(config, shapes)
    anatomy = replace(FAMILIES[model_type], family=model_type)
    root, _, path = anatomy.blocks.partition(".")
    rootless = not any(name.startswith(f"{anatomy.blocks}.") for name in shapes)
    inside = _modules_in_blocks(path if rootless else anatomy.blocks, shapes)
    missing = [layer for layer in anatomy.roles if layer not in inside]
    if missing:
        seen = ", ".join(sorted(inside)[:8]) or f"no such blocks, but {', '.join([*shapes][:4])}"
        raise ModelError(
            f"config.json says model_type {model_type!r}, whose blocks {anatomy.blocks}.<index> have "
            f"{missing[0]}; the weights have {seen}. Give config.json and weights of one model"
        )
    if rootless and _is_trunk(config):
        anatomy = _without_root(anatomy, root)
    sites = tuple(_with_valid_source(site, config, inside) for site in anatomy.sites)
    return replace(anatomy, sites=sites)


def _modules_in_blocks(blocks: str, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Paths, relative to a block, of the modules that own a tensor in any block."""
    prefix = f"{blocks}."
    relative = (name.removeprefix(prefix).partition(".")[2] for name in shapes if name.startswith(prefix))
    return {name.rpartition(".")[0] for name in relative}


def _is_trunk(config: Mapping[str, Any]) -> bool:
    """Whether the folder holds the bare trunk, `BertModel`, and not a model for a task, `BertForMaskedLM`."""
    architecture = next(iter(config.get("architectures") or ()), "")
    return architecture.endswith("Model") and "For" not in architecture and "Head" not in architecture


def _without_root(anatomy: Anatomy, root: str) -> Anatomy:
    """The anatomy of the bare trunk: its module paths lack the first word, and there are no heads."""
    prefix = f"{root}."

    def strip(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path.removeprefix(prefix) for path in paths if path.startswith(prefix))

    return replace(
        anatomy,
        blocks=anatomy.blocks.removeprefix(prefix),
        before=strip(anatomy.before),
        after=strip(anatomy.after),
        embedding=anatomy.embedding.removeprefix(prefix),
        head=None,
    )


def _with_valid_source(site: Site, config: Mapping[str, Any], inside: set[str]) -> Site:
    """The site, without its source where the config rules the fold out or the source has no weights."""
    key, value = site.requires or ("", None)
    valid = site.source in inside and (site.requires is None or config.get(key) == value)
    return site if valid else replace(site, source=None)
