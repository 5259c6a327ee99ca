"""What calibration sees of experts is what each of them, run alone, adds for the tokens it was asked about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM

from compress.calibrate.routing import routings
from compress.models.store import LazyModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of two blocks; the third expert of the first puts out nothing."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = MixtralForCausalLM(config)
    model.model.layers[0].mlp.experts.down_proj.data[2] = 0
    path = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(path)
    return path


def test_tokens_and_contributions_are_those_of_a_plain_loop(folder: Path, tmp_path: Path) -> None:
    tokens = torch.randint(0, 64, (150, 16), generator=torch.Generator().manual_seed(1))  # more than a batch
    found = routings(LazyModel.open(folder), tokens, tmp_path / "scratch", [f"model.layers.{n}.mlp" for n in (0, 1)])
    assert not (tmp_path / "scratch").exists()
    model = MixtralForCausalLM.from_pretrained(folder)
    for index, block in enumerate(model.model.layers):
        inputs: list[torch.Tensor] = []
        hook = block.mlp.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(tokens)
            hook.remove()
            x = inputs[0].flatten(0, 1)
            weights, chosen = (x @ block.mlp.gate.weight.T).softmax(dim=-1).topk(2)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            outputs = []
            for expert in range(4):
                gate, up = (x @ block.mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                outputs.append((torch.nn.functional.silu(gate) * up) @ block.mlp.experts.down_proj[expert].T)
        seen = found[f"model.layers.{index}.mlp"]
        asked = chosen.unsqueeze(-1) == torch.arange(4)
        assert torch.equal(seen.tokens, asked.sum(dim=(0, 1)))
        lengths = torch.stack(outputs, dim=1).norm(dim=-1)
        share = (asked * weights.unsqueeze(-1)).sum(dim=1)
        assert_close(seen.contributions, ((share * lengths).sum(dim=0) / seen.tokens).double(), rtol=1e-4, atol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(outputs[0][:256].flatten(), outputs[1][:256].flatten(), dim=0)
        assert float(seen.similarity[0, 1]) == pytest.approx(float(cosine), abs=1e-4)
    silent = found["model.layers.0.mlp"]
    assert float(silent.contributions[2]) == 0
    assert not silent.similarity[2].any()
