from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.calibrate.activations import Activations
from compress.calibrate.block import Block
from compress.calibrate.walk import enter, walk
from compress.core.affine import quantize
from compress.core.inputs import NARROWEST, SHARES, round_inputs
from compress.core.ranges import minmax
from compress.core.scheme import Grid
from compress.models.store import LazyModel

INDEX = 1


@pytest.fixture
def model(tiny: Path) -> LazyModel:
    return LazyModel.open(tiny)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 250, (9, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def block(model: LazyModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Block]:
    """The second block, fed by the first, in batches of four windows so that the last one is short."""
    monkeypatch.setattr("compress.calibrate.block.BATCH_TOKENS", 4 * 24)
    entrance = enter(model, tokens, tmp_path / "activations-0")
    steps = walk(model, entrance, entrance.inputs, tmp_path, lambda block: None)
    _, outputs = next(steps)
    model.materialise(model.block_name(INDEX))
    return Block(model, INDEX, outputs, entrance.arguments[INDEX], tmp_path)


def rounded(block: Block, name: str) -> None:
    grid = Grid(3, symmetric=True, group_size=32)
    weight = block.weight(name)
    block.quantize(name, quantize(weight, *minmax(weight, grid, torch.bfloat16), grid))


def observed_directly(block: Block, name: str) -> Tensor:
    """The layer's inputs from one plain forward pass over all windows."""
    caught: list[Tensor] = []
    layer = block.model.module.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    hidden = block.inputs.read(0, block.inputs.windows)
    with torch.inference_mode():
        block.module(hidden, *block.arguments.args, **block.arguments.kwargs)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1])


def test_moments_at_each_site_are_those_of_a_plain_forward_pass_through_what_is_quantized(block: Block) -> None:
    """Also when a sublayer resumes from stored inputs: after attention is quantized, and after the MLP's inputs are."""
    for site in block.sites:
        hessian = block.moments(site).hessian
        inputs = observed_directly(block, site.layers[0]).double()
        expected = inputs.T @ inputs / len(inputs)
        assert torch.allclose(hessian, expected, rtol=1e-4, atol=1e-6 * expected.diagonal().max().item())
        for name in site.layers:
            rounded(block, name)


def test_stored_inputs_give_the_outputs_of_the_whole_block(block: Block, tmp_path: Path) -> None:
    for site in block.sites:
        block.moments(site)
        for name in site.layers:
            rounded(block, name)
    assert set(block._sublayers) == {1, 3}
    outputs = block.propagate(Activations(tmp_path / "out", 24, 64, torch.float32))
    hidden = block.inputs.read(0, 9)
    with torch.inference_mode():
        expected = block.module(hidden, *block.arguments.args, **block.arguments.kwargs)
    assert torch.allclose(outputs.read(0, 9), expected, atol=1e-5)


def test_stored_inputs_are_dropped_when_something_before_them_changes(block: Block) -> None:
    attention, output = block.sites[0], block.sites[1]
    before = block.moments(output).hessian
    rounded(block, attention.layers[0])
    assert not torch.equal(block.moments(output).hessian, before)


def test_the_original_stream_is_that_of_the_block_before_it_was_quantized(block: Block, tmp_path: Path) -> None:
    outputs = Activations(tmp_path / "original", 24, 64, torch.float32)
    block._original = (block.inputs, outputs)
    expected = {site.index: observed_directly(block, site.layers[0]) for site in block.sites}
    before = block.forward(block.inputs.read(0, 9))
    for site in block.sites:
        for name in site.layers:
            rounded(block, name)
    for index, seen in expected.items():
        assert torch.allclose(block.reference.sites[index].read(0, 9).flatten(0, 1), seen, atol=1e-6)
    assert torch.allclose(outputs.read(0, 9), before, atol=1e-5)


def test_the_cross_moment_is_that_of_original_and_compressed_inputs(block: Block, tmp_path: Path) -> None:
    block._original = (block.inputs, Activations(tmp_path / "original", 24, 64, torch.float32))
    site = block.sites[2]
    original = observed_directly(block, site.layers[0]).double()
    for name in block.sites[0].layers:
        rounded(block, name)
    compressed = observed_directly(block, site.layers[0]).double()
    cross = block.moments(site, cross=True).cross
    assert cross is not None
    expected = original.T @ compressed / len(original)
    assert torch.allclose(cross, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_there_is_no_original_stream_unless_the_walk_keeps_one(block: Block) -> None:
    with pytest.raises(ValueError, match="there is no original stream"):
        _ = block.reference


def test_rounded_inputs_are_what_a_layer_and_its_statistics_see(block: Block) -> None:
    site, grid = block.sites[0], Grid(4)
    plain = observed_directly(block, site.layers[0])
    expected = round_inputs(plain, grid).double()
    hessian = block.moments(site, grid).hessian
    assert torch.allclose(hessian, expected.T @ expected / len(expected), rtol=1e-4, atol=1e-6)
    name = site.layers[0]
    before = block.forward(block.inputs.read(0, 9))
    tensor = quantize(block.weight(name), *minmax(block.weight(name), Grid(8), torch.bfloat16), Grid(8))
    block.quantize(name, tensor, grid)
    rough = block.forward(block.inputs.read(0, 9))
    block.close()
    smooth = block.forward(block.inputs.read(0, 9))
    assert (rough - before).norm() > 5 * (smooth - before).norm()


def test_statistics_are_of_inputs_as_they_come_even_after_a_layer_rounds_them(block: Block) -> None:
    site = block.sites[0]
    before = block.moments(site).hessian
    name = site.layers[0]
    tensor = quantize(block.weight(name), *minmax(block.weight(name), Grid(8), torch.bfloat16), Grid(8))
    block.quantize(name, tensor, Grid(4))
    block._moments.clear()
    assert torch.equal(block.moments(site).hessian, before)


def test_one_scale_for_all_tokens_covers_at_most_the_largest_input(block: Block) -> None:
    site, grid = block.sites[0], Grid(8, rows=None)
    largest = observed_directly(block, site.layers[0]).abs().max()
    name = site.layers[0]
    tensor = quantize(block.weight(name), *minmax(block.weight(name), Grid(8), torch.bfloat16), Grid(8))
    block.quantize(name, tensor, grid)
    tried = torch.linspace(1, NARROWEST, SHARES) * float(largest) / 127.5
    assert ((block.input_scales[name].float() / tried - 1).abs() < 2**-8).any()


def watch(module: nn.Module, name: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note in `ran` whenever the module computes; its hooks are called also where it is passed over."""
    compute = type(module).forward

    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        if self is module:
            ran.append(name)
        return compute(self, hidden)

    monkeypatch.setattr(type(module), "forward", forward)


def test_a_site_can_be_observed_again_after_its_sublayer_was_kept(block: Block) -> None:
    """As a second stage does that works on other layers than the first."""
    first, closing = block.sites[0], block.sites[1]
    before = block.moments(first).hessian
    closed = block.moments(closing).hessian
    rounded(block, closing.layers[0])
    block.moments(block.sites[2])
    assert torch.equal(block.moments(first).hessian, before)
    assert torch.equal(block.moments(closing).hessian, closed)


def test_a_sublayer_that_is_done_with_is_not_run_again(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj"):
        watch(block.module.get_submodule(name), name, ran, monkeypatch)
    for site in block.sites[:2]:
        block.moments(site)
    ran.clear()
    block.moments(block.sites[2])
    assert ran == ["self_attn.o_proj"] * 3
    ran.clear()
    block.moments(block.sites[3])
    assert ran == []


def test_the_last_linear_changed_once_more_is_run_once_more(block: Block) -> None:
    for site in block.sites:
        block.moments(site)
    before = block.moments(block.sites[2]).hessian
    rounded(block, block.sites[1].layers[0])
    assert not torch.equal(block.moments(block.sites[2]).hessian, before)


@pytest.mark.parametrize("site", [0, 1, 2, 3])
def test_folding_a_scale_into_a_source_preserves_the_function(block: Block, site: int) -> None:
    hidden = block.inputs.read(0, 9)
    place = block.sites[site]

    def answer() -> Tensor:
        with torch.inference_mode():
            return block.module(hidden, *block.arguments.args, **block.arguments.kwargs)

    before = answer()
    width = block.weight(place.layers[0]).shape[1]
    scale = block.tie(place, torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.5)
    stored = block.fold(place, scale)
    for name in place.layers:
        block.rewrite(name, block.weight(name) * stored)
    assert torch.allclose(answer(), before, atol=1e-4)
    assert block.rewritten


def test_a_tied_scale_is_shared_by_the_query_heads_of_a_value_head(block: Block) -> None:
    scale = torch.rand(64) + 0.5
    tied = block.tie(block.sites[1], scale).view(2, 2, 16)
    assert torch.equal(tied[:, 0], tied[:, 1])
    assert torch.allclose(tied[0, 0].log(), scale.view(2, 2, 16)[0].log().mean(dim=0))


def test_the_walk_empties_each_block_and_hands_over_its_outputs(
    model: LazyModel, tokens: Tensor, tmp_path: Path
) -> None:
    entrance = enter(model, tokens, tmp_path / "activations-0")
    seen = [block.index for block, _ in walk(model, entrance, entrance.inputs, tmp_path, lambda block: None)]
    assert seen == [0, 1, 2]
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["activations-0", "activations-1"]
