"""One run on its way: the plan, the files, and how far it has come.

`compress.pipeline` says what happens in which order; here is how each step is done. Every step leaves its result on
disk and notes it in the manifest before the next begins, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.calibrate import BATCH_TOKENS
from compress.calibrate.activations import Activations
from compress.calibrate.block import Block
from compress.calibrate.capture import finish
from compress.calibrate.walk import enter, inputs_of, walk
from compress.checkpoint import kv_cache, sparse_24
from compress.checkpoint.adapter import ADAPTER, adapter_config, create_adapter, open_adapter, write_products
from compress.checkpoint.folder import OutputFolder
from compress.checkpoint.manifest import Manifest, write_atomically
from compress.checkpoint.weights import open_model
from compress.core.kv import parse_kv_scheme
from compress.errors import VerificationError
from compress.models.experts import MIXTURES
from compress.models.store import LazyModel, compute_dtype, give_back
from compress.pipeline.decisions import decide
from compress.pipeline.texts import Texts
from compress.plan import PROBE_WINDOWS, Plan
from compress.plan.exports import engines
from compress.plan.footprint import peak_memory_so_far, versions
from compress.recipe import dump
from compress.scoring import Progress, score_streams

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Largest relative difference of logits between the walk and the reloaded files. Both run the same operations on the
same values; on one machine the difference is zero."""


@dataclass
class Job:
    """One run: the plan, the model on disk, the windows, and how far it has come."""

    plan: Plan
    folder: OutputFolder
    model: LazyModel
    texts: Texts
    manifest: Manifest
    tell: Progress
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def create(
        cls, plan: Plan, folder: OutputFolder, texts: Texts, manifest: Manifest, device: str, tell: Progress
    ) -> Job:
        dtype = compute_dtype(plan.layers[0].dtype, plan.recipe.calibration.dtype, device)
        model = LazyModel(plan.open_weights(), dtype=dtype, device=device)
        plan, model = decide(plan, model, texts.windows.tokens, folder.scratch, manifest, tell)
        folder.metadata = plan.metadata
        return cls(plan, folder, model, texts, manifest, tell)

    @property
    def tokens(self) -> Int[Tensor, "windows length"]:
        """What is sent through the blocks: the calibration windows, or a few to verify the result with."""
        return self.texts.windows.tokens if self.plan.calibrated else self.texts.windows.tokens[:PROBE_WINDOWS]

    # ---- walk --------------------------------------------------------------------------------------------------

    def walk(self) -> None:
        """Quantize every block that is not finished yet; each ends as a final shard."""
        done = self.manifest.blocks
        if done == self.plan.num_blocks:
            return
        entrance = enter(self.model, self.tokens, inputs_of(0, self.folder.scratch), resumed=done > 0)
        self.manifest.width = entrance.inputs.width
        inputs = self._activation_file(done) if done else entrance.inputs
        if self.plan.products and not done:
            modules = [name for name, _ in self.model.module.named_modules()]
            config = adapter_config(self.plan.products, modules, causal=self.plan.anatomy.head is not None)
            create_adapter(self.folder.partial / ADAPTER, config, self.plan.products)
        self.say("blocks", f"block {done + 1} of {self.plan.num_blocks}")
        two, form = self.plan.recipe.two_streams, self.plan.format
        scales = form.scale_dtype(self.plan.quantized.values())
        steps = walk(self.model, entrance, inputs, self.folder.scratch, self.work, done, two, form.packs, scales)
        for block, outputs in steps:
            shard = self._encode(block)
            self.folder.write_shard(block.index, shard)
            if self.plan.products:
                write_products(self.folder.partial / ADAPTER, self.plan.products, block.compensated)
            self._read_back(block)
            self.manifest.blocks = block.index + 1
            self.manifest.save()
            self.say("blocks", f"block {min(block.index + 2, self.plan.num_blocks)} of {self.plan.num_blocks}")
            del block, shard, outputs  # or they would stay until the next block is done

    def work(self, block: Block) -> None:
        recipe = self.plan.recipe
        for index, stage in enumerate(recipe.walked, start=len(recipe.stages) - len(recipe.walked)):
            begun = time.monotonic()
            if stage.role == "shaper":
                reports = stage.shape(block, self.plan.learned)
            elif stage.role == "pruner":
                reports = stage.prune(block, self.plan.pruned(index, block.index))
            else:
                reports = stage.apply(block, self.plan.schemes(index, block.index))
            self.manifest.layers[index] += [asdict(report) for report in reports]
            self.manifest.seconds[index] += time.monotonic() - begun

    def _encode(self, block: Block) -> dict[str, Tensor]:
        """A finished block's tensors as they are stored: quantized, rewritten, or bit for bit."""
        tensors: dict[str, Tensor] = {}
        weights = self.model.weights
        prefix = f"{block.name}."
        for name, header in weights.tensors.items():
            layer = name.removesuffix(".weight")
            if not name.startswith(prefix):
                continue
            if name.endswith(".weight") and layer in block.quantized:
                stored_as = header.name.removesuffix(".weight")
                inputs = self.plan.quantized[layer].inputs
                scale = block.input_scales.get(layer)
                encoded = self.plan.format.encode(stored_as, block.quantized[layer], inputs, scale)
                if layer in block.compensated and not self.plan.format.packs:
                    encoded = {key: block.approximation(layer).to(value.dtype) for key, value in encoded.items()}
                turned = self.plan.anatomy.transposed
                tensors |= {key: value.t() if turned else value for key, value in encoded.items()}
            elif layer in self.plan.compact:
                tensors |= sparse_24.encode(header.name.removesuffix(".weight"), block.stored(name))
            elif name in block.rewritten:
                tensors[header.name] = block.stored(name)
            else:
                tensors[header.name] = weights.read(name)
        if block.cache_scales:
            outputs = (layer for layer in self.plan.layers if layer.block == block.index and layer.role == "attn.o")
            output = f"{next(outputs).name}.weight"
            tensors |= kv_cache.encode(weights.tensors[output], block.cache_scales, weights.dtype(output))
        return tensors

    def _read_back(self, block: Block) -> None:
        """What lies on disk must decode to exactly the codes, scales and products that the stages decided on."""
        if not self.plan.format.packs:
            return
        shard = self.folder.partial / self.folder.shard_name(block.index)
        stored, adapter = load_file(shard), open_adapter(self.folder.partial)
        wrong: list[tuple[Path, str]] = []
        for layer, tensor in block.quantized.items():
            name = self.model.weights.tensors[f"{layer}.weight"].name.removesuffix(".weight")
            if self.plan.format.decode(name, stored, tensor.grid) != tensor:
                wrong.append((shard, layer))
        for layer in (each.name for each in self.plan.layers if each.compact and each.block == block.index):
            name = self.model.weights.tensors[f"{layer}.weight"].name.removesuffix(".weight")
            if not torch.equal(sparse_24.decode(name, stored), block.stored(f"{layer}.weight").cpu()):
                wrong.append((shard, layer))
        for layer, factors in block.compensated.items():
            if not all(map(torch.equal, adapter.read(layer), (factor.cpu() for factor in factors))):
                wrong.append((adapter.file, layer))
        if wrong:
            raise VerificationError(
                f"{wrong[0][0]}: {wrong[0][1]} does not decode to what was encoded. "
                "The disk or its memory is faulty, or this is a bug: please report it"
            )

    # ---- finish ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write what lies outside the blocks, and everything that makes the folder a checkpoint."""
        if self.manifest.phase != "blocks":
            return
        weights = self.model.weights
        outside = self.plan.shards[-1]
        rest = {header.name: weights.read(name) for name, header in weights.tensors.items() if header.name in outside}
        self.folder.write_shard(self.plan.num_blocks, rest)
        del rest
        give_back()
        config = dict(self.plan.after.config)
        linear = [name for name, module in self.model.module.named_modules() if isinstance(module, nn.Linear)]
        kept = [name for name in linear if name not in self.plan.quantized and name not in self.plan.compact]
        if weights.stacks and self.plan.format.name == "compressed-tensors":
            kept += MIXTURES  # whose parts are layers to an engine, and none to transformers
        online, dtype = self.model.weights.online, self.plan.layers[0].dtype
        quantization = self.plan.format.quantization_config(self.plan.quantized, kept, online, dtype)
        cache = self.plan.recipe.cache
        if quantization and (self.plan.quantized or self.plan.compact or (cache and cache.static)):
            config["quantization_config"] = quantization
        if cache:
            decision = self.manifest.facts.get("kv_cache")
            scheme = decision["schemes"] if decision else parse_kv_scheme(cache.scheme)
            config = kv_cache.with_cache(config, scheme)
        names = [self.folder.shard_name(index) for index in range(len(self.plan.shards))]
        index = {name: names[shard] for shard, held in enumerate(self.plan.shards) for name in held}
        self.folder.write_rest(self.plan.folder, config, index, self.plan.tensor_bytes_after)
        write_atomically(self.folder.partial / "recipe.yaml", dump(self.plan.recipe).encode())
        self.manifest.phase = "written"
        self.manifest.save()

    # ---- verify ------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Reload the files from disk, run the first batch of windows, compare the logits of the first."""
        if self.manifest.phase == "verified":
            return
        self.say("verify", "reloading the checkpoint")
        hidden = self._activation_file(self.plan.num_blocks)
        batch = max(1, BATCH_TOKENS // hidden.length)
        tokens = self.tokens[:batch]
        with self.model.streamed():
            expected = finish(self.model, tokens[:1], hidden.read(0, 1))
        give_back()
        reloaded = open_model(self.folder.partial, dtype=self.model.dtype, device=str(self.model.device))
        scratch = self.folder.scratch / "verify"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        entrance = enter(reloaded, tokens, inputs_of(0, scratch))
        *_, (_, result) = walk(reloaded, entrance, entrance.inputs, scratch, lambda block: None)
        with reloaded.streamed():
            computed = finish(reloaded, tokens[:1], result.read(0, 1))
        difference = ((computed - expected).float().norm() / expected.float().norm()).item()
        limit = TOLERANCE[self.model.dtype]
        if not difference <= limit:
            raise VerificationError(
                f"{self.folder.partial}: reloaded, it computes logits that differ by {difference:.2e} (limit {limit}) "
                "from those of the run. The folder is kept for inspection; please report this"
            )
        self.manifest.facts["verification"] = {
            "max_relative_difference": difference,
            "tokens": int(tokens[:1].numel()),
        }
        self.manifest.phase = "verified"
        self.manifest.save()

    # ---- score -------------------------------------------------------------------------------------------------

    def score(self) -> tuple[dict[str, Any] | None, str]:
        """Perplexity and divergence of the folder against the original; or why there is none."""
        if self.plan.anatomy.head is None:
            return None, "an encoder has no perplexity; use `netsuke eval --tasks`"
        give_back()
        options = self.plan.recipe.evaluation
        if not self.texts.streams:
            return None, "no text to score on: give --calibration FILE, or evaluation.text in the recipe"
        scores = score_streams(
            self.folder.partial,
            self.plan.original.path,
            self.texts.tokenizer,
            self.texts.streams,
            context=min(options.sequence_length or self.plan.context, self.plan.context),
            limit=options.samples,
            device=str(self.model.device),
            progress=self._scored,
        )
        return {
            "model": str(self.folder.final),
            "baseline": str(self.plan.original.path),
            "texts": scores,
            "tasks": {},
        }, ""

    def _scored(self, phase: str, share: float, words: str) -> None:
        give_back()
        self.say(phase, words, share)

    # ---- report ------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Everything a reader of the checkpoint wants to know."""
        evaluation, note = self.score()
        plan, manifest = self.plan, self.manifest
        stages = [
            {"name": stage.name, "seconds": manifest.seconds[index], "layers": manifest.layers[index]}
            for index, stage in enumerate(plan.recipe.stages)
        ]
        return {
            "recipe": dump(plan.recipe),
            "recipe_name": plan.recipe.name,
            "model": str(plan.original.path),
            "stages": stages,
            "bytes_before": plan.bytes_before,
            "bytes_after": sum(file.stat().st_size for file in self.folder.weight_files),
            "parameters_before": plan.parameters_before,
            "parameters_after": plan.parameters_after,
            "bits_per_weight": plan.bits_per_weight,
            "calibration": self._calibration(),
            "peak_memory_bytes": peak_memory_so_far(),
            "seconds": time.monotonic() - self.started,
            "versions": versions(),
            "evaluation": evaluation,
            "evaluation_note": note,
            "gates": _gates(plan, evaluation),
            "verification": manifest.facts["verification"],
            "allocation": manifest.facts.get("allocation"),
            "kv_cache": manifest.facts.get("kv_cache"),
            "rotation": manifest.facts.get("rotate"),
            "shape": manifest.facts.get("shape"),
            "segments": manifest.facts.get("segments", []),
            "notes": list(plan.notes),
            "generates": plan.anatomy.head is not None,
            "engines": self._engines(),
            "exports": list(manifest.facts.get("exports", {}).values()),
            "roles": {layer.name: layer.role for layer in plan.layers},
            "block_of": {layer.name: layer.block for layer in plan.layers if layer.block is not None},
        }

    def _engines(self) -> list[str]:
        plan = self.plan
        mixture = bool(plan.anatomy.mixture)
        return engines(plan.recipe, plan.quantized, plan.format, plan.after.config, mixture=mixture)

    def _calibration(self) -> dict[str, Any] | None:
        if not self.plan.recipe.calibrated:
            return None
        tokens = self.texts.windows.tokens
        return {
            "dataset": self.plan.recipe.calibration.dataset,
            "tokens": tokens.numel(),
            "windows": len(tokens),
            "sequence_length": tokens.shape[1],
            "hash": self.texts.windows.hash,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def say(self, phase: str, words: str, share: float = 0.0) -> None:
        """Report progress as a share of the whole run, each phase weighted by the tokens it has to push."""
        blocks = self.tokens.numel() * (3.0 if self.plan.calibrated else 1.0)
        scoring = 2.0 * self.plan.recipe.evaluation.samples * self.plan.context * len(self.texts.streams)
        whole = blocks + scoring
        done = blocks * self.manifest.blocks / self.plan.num_blocks + (scoring * share if phase == "score" else 0.0)
        self.tell(phase, done / whole, words)

    def _activation_file(self, index: int) -> Activations:
        windows, length = self.tokens.shape
        return Activations(
            inputs_of(index, self.folder.scratch), length, self.manifest.width, self.model.dtype, windows
        )


def _gates(plan: Plan, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each gate of the recipe with what was measured, the worst text deciding; None where nothing was."""
    texts = evaluation["texts"] if evaluation else []
    values = {
        "max_perplexity_ratio": max((text["perplexity_ratio"] for text in texts), default=None),
        "max_kl_divergence": max((text["kl_divergence"] for text in texts), default=None),
        "max_bytes_ratio": plan.bytes_after / plan.bytes_before,
    }
    return [
        {
            "name": name,
            "limit": limit,
            "value": values[name],
            "met": None if values[name] is None else values[name] <= limit,
        }
        for name, limit in asdict(plan.recipe.gates).items()
        if limit is not None
    ]
