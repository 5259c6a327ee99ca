"""What the engine that will run a checkpoint can do with it, said before the work begins.

A recipe names where its result will run, and whatever would fail to load there, hours later and in another program, is
an error of the plan:

    target: {engine: vllm, gpu: hopper, tensor_parallel: 4}

Three kinds of mistake are looked for. An engine has no reader for a format, or no kernel for a scheme. A GPU has no
arithmetic for it: some schemes then run with weights alone, which is another model than the one that was scored, and is
noted. Layers are cut apart: with tensor parallelism the rows of `o` and `down` are divided among GPUs, and a scale that
is shared across the cut belongs to neither part.

Sources: vLLM's table of supported hardware (features/quantization, v0.15), its compressed-tensors schemes (WNA16: 2 to
8 bits symmetric, 4 and 8 asymmetric), llm-compressor's table of least compute capabilities, SGLang's
compressed_tensors/__init__.py (4 and 8 bits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.checkpoint import Format
from compress.core.scheme import Scheme
from compress.models.selection import LayerName
from compress.recipe import Recipe

CAPABILITY = {"turing": 7.5, "ampere": 8.0, "ada": 8.9, "hopper": 9.0, "blackwell": 10.0}
READS = {
    "vllm": ("compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "torchao", "dense"),
    "sglang": ("compressed-tensors", "gptq", "awq", "dense"),
    "transformers": ("compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "torchao", "dense"),
}
"""Engine → formats of a run that it reads."""
BITS: dict[str, dict[bool, Sequence[int]]] = {
    "vllm": {True: range(2, 9), False: (4, 8)},
    "sglang": {True: (4, 8), False: ()},
}
"""Engine → symmetric → widths of integer weights beside inputs that stay as they are."""
ROW_PARALLEL = ("attn.o", "mlp.down")
"""Roles whose inputs are divided among GPUs; those of others are whole, and their outputs divided."""


def problems(
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    layers: Sequence[LayerName],
    form: Format,
    config: Mapping[str, Any],
) -> list[str]:
    """Why the target cannot run this, a sentence each. `config`: of the model as it will be."""
    target = recipe.target
    where = recipe.where("target")
    found = []
    if target.engine and form.name not in READS[target.engine]:
        known = ", ".join(READS[target.engine])
        found.append(f"{where}: {target.engine} reads no {form.name}. Use format {known}")
    for scheme in sorted(set(schemes.values()), key=str):
        found += [f"{where}: {reason}" for reason in _unsupported(recipe, scheme)]
    if recipe.cache and target.engine and not recipe.cache.static:
        found.append(
            f"{where}: {target.engine} keeps no cache in {recipe.cache.scheme}, which only compress.load does. "
            "Use kv_cache: {scheme: fp8}, or leave it out"
        )
    if recipe.view and recipe.view.online and target.engine in ("sglang", "transformers"):
        found.append(f"{where}: {target.engine} does not rotate inputs while the model runs. Set r4: false")
    heads = config.get("num_attention_heads") or target.tensor_parallel
    if heads % target.tensor_parallel:
        found.append(f"{where}: {heads} heads are not divisible by tensor_parallel={target.tensor_parallel}")
    roles = {layer.name: layer.role for layer in layers}
    return found + [f"{where}: {reason}" for reason in _divided(target.tensor_parallel, schemes, shapes, roles)]


def notes(recipe: Recipe, schemes: Mapping[str, Scheme]) -> list[str]:
    """What the target does otherwise than it was scored."""
    gpu = recipe.target.gpu
    if gpu is None:
        return []
    return [
        f"{gpu} does not compute in {scheme.name}: engines run its weights alone, and inputs are not rounded as here"
        for scheme in sorted(set(schemes.values()), key=str)
        if scheme.inputs and scheme.inputs.kind == "float" and CAPABILITY[gpu] < _native(scheme)
    ]


def _unsupported(recipe: Recipe, scheme: Scheme) -> list[str]:
    """Why no kernel of the engine, or of the GPU, runs a scheme."""
    engine, gpu, weights = recipe.target.engine, recipe.target.gpu, scheme.weights
    kind = "symmetric" if weights.symmetric else "asymmetric"
    found = []
    if engine and engine in BITS and weights.kind == "int" and not scheme.inputs:
        widths = BITS[engine][weights.symmetric]
        if not widths:
            found.append(f"{engine} reads no {kind} {weights.bits}-bit weights. Set symmetric: true")
        elif weights.bits not in widths:
            told = ", ".join(map(str, widths))
            found.append(f"{engine} runs {kind} weights of {told} bits, not of {weights.bits}")
    if engine in BITS and scheme.inputs and scheme.inputs.kind == "int" and scheme.inputs.bits == 4:
        found.append(f"{engine} has no kernel for inputs of 4 bits ({scheme.name}). Use w4a8 or w8a8")
    if gpu and CAPABILITY[gpu] < (least := _least(scheme)):
        older = next(name for name, capability in CAPABILITY.items() if capability >= least)
        found.append(
            f"{gpu} (compute capability {CAPABILITY[gpu]}) runs no {scheme.name}, which takes {older} ({least})"
        )
    return found


def _native(scheme: Scheme) -> float:
    """The least compute capability whose matrix units multiply float inputs of this kind."""
    return 10.0 if scheme.inputs and scheme.inputs.bits == 4 else 8.9


def _least(scheme: Scheme) -> float:
    """The least compute capability on which engines run a scheme at all: float weights by dequantizing them."""
    if scheme.weights.kind != "float":
        return 9.0 if scheme.inputs and scheme.inputs.kind == "float" else 7.5
    return 8.0


def _divided(
    parts: int, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], roles: Mapping[str, str]
) -> list[str]:
    """Scales that would be shared across a cut: the first layer of each role."""
    found: dict[str, str] = {}
    for name, scheme in schemes.items() if parts > 1 else ():
        grid, role = scheme.weights, roles.get(name, "")
        axis = 1 if role in ROW_PARALLEL else 0
        size = shapes[name][axis]
        shared = grid.group_size if axis else grid.rows
        if role in found:
            continue
        if size % parts:
            found[role] = (
                f"{name}: {size} {'inputs' if axis else 'outputs'} are not divisible by tensor_parallel={parts}"
            )
        elif shared and (size // parts) % shared:
            fits = [str(each) for each in (128, 64, 32) if (size // parts) % each == 0]
            fix = f"Use group_size: {' or '.join(fits)}" if axis and fits and grid.kind == "int" else "Use fewer parts"
            found[role] = (
                f"{name}: tensor_parallel={parts} leaves {size // parts} {'inputs' if axis else 'outputs'} to a GPU, "
                f"which is not a multiple of {shared}, and a scale would be shared by two. {fix}"
            )
    return list(found.values())
