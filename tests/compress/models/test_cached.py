"""What goes into the cache of a model, of every family that has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from compress.calibrate.cached import _Recorder, largest_cached
from compress.calibrate.walk import enter, walk
from compress.errors import NumericalError
from compress.models.anatomy import Anatomy
from compress.models.headers import Folder, read_folder
from compress.models.store import LazyModel, Weights
from compress.runtime.decode import cache_argument


def measured(headers: Folder, tokens: Tensor, scratch: Path) -> list[tuple[Tensor, Tensor]]:
    lazy = LazyModel(Weights(headers), dtype=torch.float32)
    entrance = enter(lazy, tokens, scratch / "activations-0")
    found: list[tuple[Tensor, Tensor]] = []
    list(walk(lazy, entrance, entrance.inputs, scratch, lambda block: found.append(largest_cached(block))))
    return found


def test_largest_keys_and_values_are_those_that_transformers_caches(
    model: PreTrainedModel, anatomy: Anatomy, headers: Folder, tokens: Tensor, tmp_path: Path
) -> None:
    if anatomy.family == "bert":
        pytest.skip("an encoder has no cache")
    found = measured(headers, tokens, tmp_path)
    cache = DynamicCache()
    with torch.inference_mode():
        model(tokens, **{cache_argument(model): cache, "use_cache": True})
    assert len(found) == len(cache.layers) == 2
    for largest, layer in zip(found, cache.layers, strict=True):
        for states, most in zip((layer.keys, layer.values), largest, strict=True):
            torch.testing.assert_close(most, states.abs().amax(dim=(0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_block_without_a_cache_and_keys_that_are_not_finite_are_told(
    model: PreTrainedModel, headers: Folder, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_Recorder, "update", lambda self, keys, values, *_, **__: (keys, values))
        with pytest.raises(NumericalError, match=r"model\.layers\.0: writes no keys and values to a cache"):
            measured(headers, tokens, tmp_path)
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = 0
    with pytest.raises(NumericalError, match=r"model\.layers\.1: values of the calibration set are NaN or infinite"):
        measured(read_folder(tmp_path / "broken"), tokens, tmp_path)
