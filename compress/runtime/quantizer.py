"""netsuke as a quantizer of transformers: a folder's quantized layers are packed for our kernels while it loads.

transformers builds the model on the meta device and reads every tensor that has a place in it. A quantized linear
layer gives its place up first, so its codes are passed over; when all else is loaded, they are read by the codecs that
wrote them, and the layer is what `compress.load` makes of it, in the type and on the device of the rest. Nothing is
ever unpacked. `compress.runtime.plugin` decides which folders come here.

    model.generate(…)         as ever; `compress.generate(model, tokenizer, …)` also honours what is said of the cache
    model.save_pretrained(…)  is refused: copy the folder, whose files are the codes
    device_map                one device; "auto" is the GPU, or the CPU where there is none
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.checkpoint import format_of
from compress.checkpoint.weights import QuantizedWeights
from compress.errors import ModelError
from compress.models.headers import Folder, read_folder
from compress.models.store import device_named
from compress.runtime.load import check_linear, pack_layers, remember

METHOD = "netsuke"


def runs(quantization: Mapping[str, Any]) -> bool:
    """Whether our runtime knows such layers, as far as a `quantization_config` tells."""
    try:
        format_of({"quantization_config": quantization}).schemes(quantization, {})
    except ModelError:
        return False
    return not quantization.get("desc_act")


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """A folder's own `quantization_config`, which it goes on being to whoever asks, to be carried out by us."""

    def __init__(self, stored: dict[str, Any], reason: str = "", **_: Any) -> None:
        self.quant_method = METHOD
        self.stored = stored
        self.reason = reason
        """Why transformers' own quantizer does not load it; empty where it was not asked."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self.stored)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads packed layers; what transformers calls, in the order in which it does."""

    requires_calibration = True
    quantization_config: PackedConfig

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1 or "disk" in devices:
            raise self._error(f"device_map: packed layers are on one device, not on {', '.join(sorted(devices))}")

    def update_device_map(self, device_map: Any) -> Any:
        self.device_map = {"": device_named("auto")} if isinstance(device_map, str) else device_map
        return self.device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise self._error("distributed_config: packed layers are on one device")
        if not checkpoint_files:
            raise self._error("state_dict: packed layers are read from the files of a folder")
        self.folder = Path(checkpoint_files[0]).parent
        try:
            folder = read_folder(self.folder)
            self.weights = QuantizedWeights(folder)
            self.places = dict(_places(model, self.weights, folder))
        except ModelError as error:
            raise self._error(str(error)) from error
        for path in self.places.values():
            model.set_submodule(path, Awaited(model.get_submodule(path)))
        model._keys_to_ignore_on_load_unexpected.update({*map(_pattern, self.weights.schemes), r"\.[kv]_scale$"})
        model._keys_to_ignore_on_load_unexpected.update(map(_pattern, self.weights.sparse))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        weights = self.weights
        del self.weights  # or it would go wherever the model is copied to
        device = next(iter((self.device_map or {"": "cpu"}).values()))
        try:
            pack_layers(model, weights, self.places, device=torch.device(device), dtype=self.dtype)
        except ModelError as error:
            raise self._error(str(error)) from error
        remember(model, weights)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        raise ModelError(
            f"save_pretrained: packed layers are not written again. Copy {self.folder}, whose files hold them, "
            "or write them in another format with `netsuke convert`"
        )

    def _error(self, problem: str) -> ModelError:
        """With what else there is to be done."""
        reason = self.quantization_config.reason
        own = f"netsuke stepped in since transformers said: {reason}" if reason else "`plugin.takes` is 'all'"
        return ModelError(f"{problem} ({own})")


class Awaited(nn.Module):
    """Stands where a packed layer will be. Of its tensors it takes none but the bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)


def _places(model: Any, weights: QuantizedWeights, folder: Folder) -> Iterator[tuple[str, str]]:
    """Quantized layer → where it is in this model, which may be the body of the stored one, or have another head."""
    modules = dict(model.named_modules())
    body = f"{model.base_model_prefix}."
    for layer in (*weights.schemes, *weights.sparse):
        path = next((path for path in (layer, layer.removeprefix(body), f"{body}{layer}") if path in modules), layer)
        if path in modules or layer.startswith(f"{weights.anatomy.blocks}."):
            check_linear(modules.get(path), layer, folder)
            yield layer, path


def _pattern(layer: str) -> str:
    """Matches the stored tensors of this layer in every block."""
    anywhere = re.sub(r"\d+", r"\\d+", re.escape(layer))
    return rf"(^|\.){anywhere}\."
