"""States of two models: the right ones are taken, and a projection finds what one can be read off the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from compress.distill.capture import Capture, projections_between
from compress.distill.features import hidden_losses
from compress.distill.objective import Outputs
from compress.models.llama import LLAMA


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_can_be_read_off_the_student_is() -> None:
    matrix, logits = normal(0, 4, 7), torch.empty(0)
    own = [normal(seed, 3, 5, 4) for seed in (1, 2)]
    answers = [(Outputs(logits, [each, each]), Outputs(logits, [each @ matrix, 2 * each])) for each in own]
    projected, same = projections_between(answers)
    states = torch.cat(own)
    assert_close(projected.matrix, matrix, atol=1e-4, rtol=0)
    assert hidden_losses(states, states @ matrix, projected).max() < 1e-8
    assert torch.equal(same.matrix, torch.eye(4))
    assert_close(hidden_losses(states, 2 * states, same).mean(), torch.tensor(1 / 4))


def test_states_are_those_after_the_blocks_and_values_those_of_the_last() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=20,
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config), torch.randint(20, (2, 5))
    seen: dict[int, Tensor] = {}
    inputs: list[Tensor] = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _, args, output, index=index: seen.__setitem__(index, output))
    last = model.model.layers[2].self_attn.v_proj
    last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outputs = Capture(model, LLAMA, torch.float32, (0, 2), values=True)(model, tokens)
    assert torch.equal(outputs.hidden[0], seen[0])
    assert torch.equal(outputs.hidden[1], model.model.norm(seen[2]))
    assert outputs.values is not None
    assert torch.equal(outputs.values, last(inputs[0]))
    assert Capture(model, LLAMA, torch.float32, (), values=False)(model, tokens).values is None
