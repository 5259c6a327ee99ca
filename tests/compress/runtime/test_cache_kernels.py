"""A model over a quantized cache whose tokens are written and read by kernels, here in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from compress.runtime.attention import quantized_cache
from compress.runtime.decode import cache_argument
from quant_kernels import kv_cache, library

pytestmark = pytest.mark.skipif(not library.INTERPRETED, reason="kernels run on a GPU here; tests marked gpu see to it")


def logits(scheme: str, block_tokens: int | None) -> Tensor:
    """Of a prompt, a chunk of it, and some tokens one by one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=96, initializer_range=0.2,
    )).eval()  # fmt: skip
    tokens = torch.randint(96, (1, 180), generator=torch.Generator().manual_seed(1))
    cache, parts = quantized_cache(model, scheme, block_tokens=block_tokens), []
    with torch.inference_mode():
        for part in tokens.split([168, 10, 1, 1], dim=1):
            parts.append(model(part, **{cache_argument(model): cache, "use_cache": True}).logits)
    return torch.cat(parts[1:], dim=1)


@pytest.mark.parametrize(("scheme", "block_tokens"), [("kv8", None), ("kv4", 32), ("fp8", 64), ("kv2-rotated", None)])
def test_kernels_compute_what_references_do(
    scheme: str, block_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, used = logits(scheme, block_tokens), set()
    for module in (kv_cache, __import__("compress.runtime.side", fromlist=["side"])):
        monkeypatch.setattr(module, "runs_kernels", lambda x: used.add(x.shape[2]) or True)
    found = logits(scheme, block_tokens)
    assert {1, 10} <= used
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
