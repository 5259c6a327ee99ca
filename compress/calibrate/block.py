"""One transformer block on the bench: filled with weights, fed with the calibration set, changed layer by layer.

`moments(site)` runs the calibration set through the block only as far as that site, with every layer that is already
quantized in place: the true-sequential order of GPTQ. To make that cheap, sublayers that are done with answer from what
was kept of them (`compress.calibrate.sublayer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from compress.calibrate import BATCH_TOKENS
from compress.calibrate.activations import Activations
from compress.calibrate.capture import Arguments
from compress.calibrate.observers import Moments, MomentsObserver
from compress.calibrate.reference import Reference
from compress.calibrate.sites import BlockSite, sites_of
from compress.calibrate.sublayer import Sublayer
from compress.core.inputs import clipping_scale, round_inputs
from compress.core.qtensor import QuantizedTensor
from compress.core.scheme import Grid
from compress.models.store import LazyModel

Stream = tuple[Activations, Activations]
"""The inputs and the outputs-to-be of a block."""


class _Reached(Exception):  # noqa: N818  (not an error: the pass has come as far as it was sent)
    pass


class Block:
    """A filled block, its calibration inputs, and what has become of its layers."""

    def __init__(
        self,
        model: LazyModel,
        index: int,
        inputs: Activations,
        arguments: Arguments,
        scratch: Path,
        original: Stream | None = None,
        packs: bool = True,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.index = index
        self.name = model.block_name(index)
        self.module = model.blocks[index]
        self.inputs = inputs
        self.quantized: dict[str, QuantizedTensor] = {}
        self.compensated: dict[str, tuple[Tensor, Tensor]] = {}
        """Quantized layer → A [out, rank] and B [rank, in], bfloat16, whose product is added to its weight."""
        self.input_scales: dict[str, Tensor] = {}
        """Layer → the scale of its inputs, of those for which calibration fixes one."""
        self.cache_scales: tuple[Tensor, Tensor] | None = None
        """Of its keys and of its values, float32, where calibration fixes them for the cache."""
        self.rewritten: dict[str, Tensor] = {}
        """Full tensor name → new full-precision value, float32, of everything a transform changed."""
        self.sites = sites_of(model, index)
        self.arguments = arguments
        self._scratch = scratch
        self.batch = max(1, BATCH_TOKENS // inputs.length)
        self._original = original
        self._packs = packs
        self._scale_dtype = scale_dtype
        self._reference: Reference | None = None
        self._rounded: dict[str, RemovableHandle] = {}
        self._moments: dict[int, tuple[object, Moments]] = {}
        self._sublayers: dict[int, Sublayer] = {}
        """Site → the sublayer that its only layer closes, kept."""

    # ---- what a stage reads -----------------------------------------------------------------------------------

    def weight(self, name: str) -> Float[Tensor, "out in"]:
        """A layer's full-precision weight in float32, [out, in] whatever the module stores. Not to be written to."""
        tensor = f"{name}.weight"
        if tensor in self.rewritten:
            return self.rewritten[tensor]
        if name in self.quantized or self.model.dtype != torch.float32:
            stored = self.model.weights.read(tensor).to(self.model.device, torch.float32)
        else:
            stored = self.model.module.get_parameter(tensor).detach()
        return stored.t().contiguous() if self.model.anatomy.transposed else stored

    def approximation(self, name: str) -> Float[Tensor, "out in"]:
        """What a quantized layer now has for a weight, in float32: Ŵ, or Ŵ + A B."""
        weight = self.quantized[name].dequantize()
        if name in self.compensated:
            A, B = self.compensated[name]
            weight += A.float() @ B.float()
        return weight

    def vector(self, tensor: str) -> Tensor:
        """A bias, or the weight of a norm, by its full name, in float32."""
        if tensor in self.rewritten:
            return self.rewritten[tensor].clone()
        return self.model.weights.read(tensor).to(self.model.device, torch.float32)

    def has_bias(self, name: str) -> bool:
        return f"{name}.bias" in self.model.weights

    def scale_dtype(self, name: str) -> torch.dtype:
        """The dtype a layer's scales are rounded to: that of its weight, unless the format wants another."""
        return self._scale_dtype or self.model.weights.dtype(f"{name}.weight")

    def moments(
        self, site: BlockSite, inputs: Grid | None = None, *, largest: bool = False, cross: bool = False
    ) -> Moments:
        """Second moments of a site's input over the calibration set, all earlier changes in place.

        `inputs`: the grid the inputs will be rounded to; where its scales follow the data, they are rounded before they
        are observed. `largest`, `cross`: what else to look at.
        """
        asked = inputs, largest or (inputs is not None and inputs.overall), cross
        if site.index not in self._moments or self._moments[site.index][0] != asked:
            self._moments.clear()  # one at a time: they are the largest thing in memory
            self._moments[site.index] = asked, self._observe(site, *asked)
        return self._moments[site.index][1]

    def sample(self, site: BlockSite) -> Float[Tensor, "tokens in"]:
        """A site's inputs in the first batch of calibration windows, in float32."""
        return self.model.rotated(site.layers[0], self._run(0, site)).flatten(0, -2).float()

    @property
    def reference(self) -> Reference:
        """What the original model computes here, transforms included. A stage with `two_streams` has it."""
        if self._reference is None:
            self._reference = self._run_original()
        return self._reference

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output for a batch of hidden states. `weights`: layer → weight [out, in] in place of its own.

        Gradients pass.
        """
        turned = self.model.anatomy.transposed
        given = {
            f"{name.removeprefix(f'{self.name}.')}.weight": weight.T if turned else weight
            for name, weight in (weights or {}).items()
        }
        result = functional_call(self.module, given, (hidden, *self.arguments.args), self.arguments.kwargs)
        return result[0] if isinstance(result, tuple) else result

    # ---- what a stage changes ---------------------------------------------------------------------------------

    def quantize(self, name: str, tensor: QuantizedTensor, inputs: Grid | None = None) -> None:
        """Replace a layer's weight by a quantized one, and have its inputs rounded to the grid `inputs`."""
        if self._original:
            _ = self.reference  # from here on the block is not the original any more
        self.quantized[name] = tensor
        if inputs:
            self._round_inputs(name, inputs)
        self._set_approximation(name)

    def compensate(self, name: str, A: Float[Tensor, "out rank"], B: Float[Tensor, "rank in"]) -> None:
        """Add the product of two thin matrices, which are stored in bfloat16, to a quantized layer's weight."""
        self.compensated[name] = A.bfloat16().contiguous(), B.bfloat16().contiguous()
        self._set_approximation(name)

    def rewrite(self, name: str, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> None:
        """Replace a layer's weight, and its bias if one is given, by full-precision ones, of any shape."""
        self.rewritten[f"{name}.weight"] = weight
        if bias is not None:
            self._rewrite_vector(f"{name}.bias", bias)
        self._set_weight(name, weight.to(self.model.dtype))

    def shift_bias(self, name: str, shift: Float[Tensor, " out"]) -> None:
        """Add to a layer's bias."""
        bias = f"{name}.bias"
        self._rewrite_vector(bias, (self.vector(bias) + shift).to(self.model.weights.dtype(bias)).float())
        self._changed(name)

    def tie(self, site: BlockSite, scale: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
        """The nearest scale that the site's source can carry: under grouped-query attention several inputs of the
        output projection come from one value channel and must share their scale (geometric mean)."""
        repeats, head_dim = self._repeats(site, scale.numel())
        if repeats == 1:
            return scale
        grouped = scale.log().view(-1, repeats, head_dim).mean(dim=1, keepdim=True).exp()
        return grouped.expand(-1, repeats, -1).reshape(-1)

    def fold(self, site: BlockSite, scale: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
        """Divide the output of the site's source by `scale`, and return the divisor that was really stored.

        A norm's weight is rounded to its storage dtype, so the exact divisor differs a little from the one asked for.
        """
        if site.source is None:
            raise ValueError(f"{site.layers[0]}: no source to fold a scale into")
        self._forget(site.index)
        if self.model.module.get_parameter(f"{site.source}.weight").dim() == 1:
            return self._fold_norm(site.source, scale)
        repeats, head_dim = self._repeats(site, scale.numel())
        rows = scale.view(-1, repeats, head_dim)[:, 0].reshape(-1)
        bias = self.vector(f"{site.source}.bias") / rows if self.has_bias(site.source) else None
        self.rewrite(site.source, self.weight(site.source) / rows.unsqueeze(1), bias)
        return scale

    # ---- what the walk does -----------------------------------------------------------------------------------

    def propagate(self, outputs: Activations) -> Activations:
        """Run the calibration set through the finished block."""
        for start in self._starts:
            outputs.append(self._run(start))
        if self._original:
            _ = self.reference  # though nothing was quantized, the next block will ask for it
        return outputs

    def close(self) -> None:
        """Leave the module as it was found."""
        for handle in self._rounded.values():
            handle.remove()

    def stored(self, name: str) -> Tensor:
        """A rewritten tensor the way the checkpoint stores it."""
        tensor = self.rewritten[name]
        turned = self.model.anatomy.transposed and tensor.dim() == 2
        return (tensor.t().contiguous() if turned else tensor).to(self.model.weights.dtype(name))

    # ---- how ---------------------------------------------------------------------------------------------------

    def _observe(self, site: BlockSite, inputs: Grid | None, largest: bool, cross: bool) -> Moments:
        observer = MomentsObserver(self._width(site.layers[0]), largest, cross)
        original = self.reference.sites[site.index] if cross else None
        for start, batch in zip(self._starts, self._inputs_of(site), strict=True):
            given = self.model.rotated(site.layers[0], batch)
            rounded = round_inputs(given, inputs) if inputs and not inputs.overall else given
            wanted = self.model.rotated(site.layers[0], original.read(start, start + self.batch)) if original else None
            observer.update(rounded, wanted)
        return observer.result(self.inputs.windows * self.inputs.length, name=site.layers[0])

    def _round_inputs(self, name: str, grid: Grid) -> None:
        if name in self._rounded:
            self._rounded.pop(name).remove()
        scale = None
        if grid.overall:
            site = next(site for site in self.sites if name in site.layers)
            largest = self.moments(site, grid).largest
            assert largest is not None, "a grid with one scale for all has its inputs looked at"
            importance = torch.stack([self.weight(layer).square().sum(dim=0) for layer in site.layers]).sum(dim=0)
            stored_as = torch.float32 if grid.scale == "e4m3" else self.scale_dtype(name)
            searched = clipping_scale(self.sample(site), grid, largest.amax(), importance)
            scale = self.input_scales[name] = searched.to(stored_as).view(1)
        self._rounded[name] = self.model.round_inputs(name, grid, scale)

    @torch.inference_mode()
    def _run_original(self) -> Reference:
        """The block as it is on the original stream: it must not have been quantized yet."""
        if not self._original:
            raise ValueError(f"{self.name}: there is no original stream; a stage that wants one says `two_streams`")
        inputs, outputs = self._original
        sites = {s.index: self._activations(f"original-inputs-{s.index}", self._width(s.layers[0])) for s in self.sites}
        with ExitStack() as stack:
            for site in self.sites:
                layer = self.model.module.get_submodule(site.layers[0])
                keep = sites[site.index].append
                hook = layer.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0]), prepend=True)
                stack.callback(hook.remove)
            for start in self._starts:
                outputs.append(self.forward(inputs.read(start, start + self.batch).to(self.model.device)))
        return Reference(inputs, outputs, sites)

    def _inputs_of(self, site: BlockSite) -> Iterator[Float[Tensor, "batch length in"]]:
        """A site's inputs over the calibration set. Where the site closes a sublayer they are kept."""
        sublayer = self._sublayers.get(site.index)
        if sublayer:
            yield from (sublayer.inputs.read(start, start + self.batch) for start in self._starts)
            return
        sublayer = self._sublayer(site)
        for start in self._starts:
            if sublayer and start == 0:
                with sublayer.examined():
                    batch = self._run(start, site, to_the_end=True)
                sublayer = sublayer if sublayer.resumable else None
            else:
                batch = self._run(start, site)
            if sublayer:
                sublayer.inputs.append(batch)
            yield batch
        if sublayer:
            self._sublayers[site.index] = sublayer

    @torch.inference_mode()
    def _run(self, start: int, site: BlockSite | None = None, to_the_end: bool = False) -> Tensor:
        """One batch through the block as far as `site`, whose input is returned; without one the block's output."""
        stop = min(start + self.batch, self.inputs.windows)
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught.append(args[0])
            if not to_the_end:
                raise _Reached

        with ExitStack() as stack:
            for index, sublayer in self._sublayers.items():
                if site is None or index < site.index:
                    stack.enter_context(sublayer.resumed(start, stop))
            if site:
                layer = self.model.module.get_submodule(site.layers[0])
                stack.callback(layer.register_forward_pre_hook(catch, prepend=True).remove)  # before any rounding
            hidden = self.inputs.read(start, stop).to(self.model.device)
            try:
                result = self.module(hidden, *self.arguments.args, **self.arguments.kwargs)
            except _Reached:
                pass
        if site:
            return caught.pop()
        return result[0] if isinstance(result, tuple) else result

    @property
    def _starts(self) -> range:
        """The first window of each batch."""
        return range(0, self.inputs.windows, self.batch)

    def _sublayer(self, site: BlockSite) -> Sublayer | None:
        """The module whose last act is this site's only layer, None where there is no such module."""
        path = site.layers[0].rpartition(".")[0]
        closes = len(site.layers) == 1 and site.roles[0] in {"attn.o", "mlp.down"}
        if not closes or path == self.name:
            return None
        find = self.model.module.get_submodule
        norm = next((s.source for s in self.sites if all(layer.startswith(f"{path}.") for layer in s.layers)), None)
        norm = norm if norm and self.model.module.get_parameter(f"{norm}.weight").dim() == 1 else None
        outputs = site is not self.sites[-1]
        return Sublayer(
            find(path),
            find(site.layers[0]),
            find(norm) if norm else None,
            self._activations(f"inputs-{site.index}", self._width(site.layers[0])),
            self._activations(f"outputs-{site.index}", self._shape(site.layers[0])[0]) if outputs else None,
        )

    def _activations(self, name: str, width: int) -> Activations:
        return Activations(self._scratch / name, self.inputs.length, width, self.model.dtype)

    def _forget(self, first: int) -> None:
        """Drop what was observed at sites from index `first` on: something before them has changed."""
        for index in [index for index in self._sublayers if index >= first]:
            del self._sublayers[index]
        for index in [index for index in self._moments if index >= first]:
            del self._moments[index]

    def _changed(self, name: str) -> None:
        """Forget what depended on a layer's output."""
        site = next(site for site in self.sites if name in site.layers)
        self._forget(site.index + 1)
        if site.index in self._sublayers:
            self._sublayers[site.index].changed()

    def _set_weight(self, name: str, weight: Tensor) -> None:
        self._changed(name)
        stored = weight.t().contiguous() if self.model.anatomy.transposed else weight
        self.model.set_parameter(f"{name}.weight", stored)

    def _set_approximation(self, name: str) -> None:
        stored_as = self.model.dtype if self._packs else self.quantized[name].scale.dtype
        self._set_weight(name, self.approximation(name).to(stored_as).to(self.model.dtype))

    def _fold_norm(self, name: str, scale: Tensor) -> Tensor:
        offset = self.model.anatomy.norm_offset
        before = self.vector(f"{name}.weight")
        dtype = self.model.weights.dtype(f"{name}.weight")
        after = ((before + offset) / scale - offset).to(dtype).float()
        self._rewrite_vector(f"{name}.weight", after)
        stored = torch.where(after + offset != 0, (before + offset) / (after + offset), scale)
        if f"{name}.bias" in self.model.weights:
            self._rewrite_vector(f"{name}.bias", self.vector(f"{name}.bias") / stored)
        return stored

    def _rewrite_vector(self, tensor: str, value: Tensor) -> None:
        self.rewritten[tensor] = value
        self.model.set_parameter(tensor, value.to(self.model.dtype))

    def _width(self, name: str) -> int:
        """Input features of a layer."""
        return self._shape(name)[1]

    def _shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a layer, however it is stored."""
        first, second = self.model.module.get_parameter(f"{name}.weight").shape
        return (second, first) if self.model.anatomy.transposed else (first, second)

    def _repeats(self, site: BlockSite, width: int) -> tuple[int, int]:
        """How often each source channel appears among the site's inputs, and the run length it repeats in."""
        source = site.source or ""
        shape = self.model.module.get_parameter(f"{source}.weight").shape
        channels = shape[0] if len(shape) == 1 else self._shape(source)[0]
        if channels == width:
            return 1, width
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return width // channels, head_dim
