"""Storage in blocks holds what contiguous storage holds, bit for bit, in the room that the tokens need."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from compress.core.kv import KV_SCHEMES, KVScheme
from compress.errors import RequestError
from compress.runtime.attention import packed_attention, quantized_cache
from compress.runtime.cache import PackedLayer
from compress.runtime.decode import cache_argument
from compress.runtime.pages import Pages
from compress.runtime.side import read

HEADS, D = 2, 32
KV8 = KV_SCHEMES["kv8"]
SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.3, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
every_scheme = pytest.mark.parametrize("scheme", KV_SCHEMES.values(), ids=KV_SCHEMES)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()
    return Gemma2ForCausalLM(Gemma2Config(**SIZE, sliding_window=70)).eval()


def states(tokens: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randn(batch, HEADS, tokens, D, generator=torch.Generator().manual_seed(seed)) + 0.4


def layer_of(
    scheme: KVScheme, padding: list[int], tokens: int, block_tokens: int | None = 64, sliding_window: int | None = None
) -> PackedLayer:
    """One that has packed a prompt of so many columns."""
    layer = PackedLayer(scheme, sliding_window, block_tokens=block_tokens)
    layer.update(states(tokens, 0, len(padding)), states(tokens, 1, len(padding)))
    layer.pack(padding)
    return layer


def add(layer: PackedLayer, tokens: int, seed: int = 2) -> None:
    layer.update(states(tokens, seed, len(layer.padding)), states(tokens, seed + 1, len(layer.padding)))


def stored(layer: PackedLayer) -> list[Tensor]:
    """Codes, scales and minima of each sequence, and what its slots hold."""
    table = layer.storage.block_table
    lines = torch.arange(len(layer.padding))[:, None] if table is None else table
    planes = [
        read(part, 0, quantized // shared, lines[row : row + 1])
        for side in layer.sides
        for _, part, shared in side.parts()
        for row, quantized in enumerate(layer.num_quantized)
    ]
    return planes + [side.slots[row, :, :n] for side in layer.sides for row, n in enumerate(layer.num_recent)]


def pages_of(layer: PackedLayer) -> Pages:
    """Raises where a block is neither free nor used as often as counted, or where a sequence has more than it needs."""
    pages = layer.storage
    assert isinstance(pages, Pages)
    users = Counter(block for blocks in pages.blocks for block in blocks)
    assert pages.num_users == [users[block] for block in range(len(pages.num_users))]
    assert sorted(pages.free) == [block for block, count in enumerate(pages.num_users) if not count]
    assert [len(blocks) for blocks in pages.blocks] == [-(-count // pages.unit) for count in layer.num_quantized]
    assert all(part.shape[0] == len(pages.num_users) for side in layer.sides for _, part, _ in side.parts())
    return pages


@pytest.mark.parametrize("block_tokens", [32, 96])
@every_scheme
def test_whatever_decoding_does_both_storages_hold_the_same_bits(scheme: KVScheme, block_tokens: int) -> None:
    padding, generator = [0, 61, 270, 280], torch.Generator().manual_seed(block_tokens)
    layers = [layer_of(scheme, padding, 281, storage) for storage in (block_tokens, None)]
    for step in range(18):
        batch, draw = len(layers[0].padding), int(torch.randint(1, 70, (), generator=generator))
        order = torch.randint(batch, (1 + draw % 5,), generator=generator)
        outputs = []
        for layer in layers:
            if step % 3 == 0:
                add(layer, draw, step)
            elif step % 9 == 4:
                layer.crop(-draw)
            elif step % 9 == 7:
                layer.reorder_cache(order)
            else:
                add(layer, 1, step)
            outputs.append(packed_attention(states(1, step, len(layer.padding)), layer, 0.2))
        paged, plain = layers
        pages_of(paged)
        assert (paged.num_quantized, paged.num_recent) == (plain.num_quantized, plain.num_recent)
        assert all(map(torch.equal, stored(paged), stored(plain)))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["kv8", "kv4"])
@pytest.mark.parametrize("kind", ["greedy", "sampling", "beams", "drafted"])
def test_a_model_has_the_same_logits_with_both(model: Any, name: str, kind: str) -> None:
    """Of a batch of unequal lengths, but for drafts, which are for one sequence; one model has sliding windows."""
    options: dict[str, Any] = {
        "greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 3},
        "drafted": {"prompt_lookup_num_tokens": 4},
    }[kind]  # fmt: skip
    prompts = torch.randint(2, 64, (1 if kind == "drafted" else 3, 12), generator=torch.Generator().manual_seed(3))
    prompts = prompts.repeat(1, 16)
    for row, padding in enumerate((0, 30, 181)[: len(prompts)]):
        prompts[row, :padding] = 0
    written = []
    for block_tokens in (64, None):
        cache = quantized_cache(model, name, block_tokens=block_tokens)
        torch.manual_seed(0)
        written.append(
            model.generate(prompts, attention_mask=(prompts > 0).long(), max_new_tokens=12, output_logits=True,
                           return_dict_in_generate=True, **{cache_argument(model): cache}, **options)
        )  # fmt: skip
    assert torch.equal(written[0].sequences, written[1].sequences)
    assert all(map(torch.equal, written[0].logits, written[1].logits))


@every_scheme
def test_a_short_sequence_does_not_take_the_room_of_a_long_one(scheme: KVScheme) -> None:
    paged, plain = (layer_of(scheme, [992, 0], 1024, storage) for storage in (64, None))
    used = paged.nbytes - paged.room_nbytes - paged.storage.nbytes
    assert used == plain.nbytes - plain.room_nbytes
    planes = [sum(side.planes.nbytes for side in layer.sides) for layer in (paged, plain)]
    needed = sum(paged.num_quantized) * HEADS * scheme.token_bytes(D, 4)
    assert needed <= planes[0] <= 1.4 * needed < 1.6 * needed < planes[1]


def test_lengths_of_their_own_are_what_a_table_says() -> None:
    pages = pages_of(layer_of(KV8, [299, 0, 200], 300))
    assert [len(blocks) for blocks in pages.blocks] == [1, 5, 2]
    assert pages.block_table.dtype == torch.int32
    assert pages.block_table.shape == (3, 5)
    assert [line[: len(blocks)] for line, blocks in zip(pages.block_table.tolist(), pages.blocks, strict=True)] == (
        pages.blocks
    )
    assert len({block for blocks in pages.blocks for block in blocks}) == 8


@every_scheme
def test_blocks_that_a_crop_frees_are_taken_again(scheme: KVScheme) -> None:
    layer = layer_of(scheme, [0, 100], 600)
    size, blocks = len(pages_of(layer).num_users), {b for each in pages_of(layer).blocks for b in each}
    layer.crop(-400)
    pages = pages_of(layer)
    assert len(pages.free) >= 8
    add(layer, 390)
    add(layer, 1)
    assert len(pages_of(layer).num_users) == size
    assert len({b for each in pages.blocks for b in each} & blocks) >= len(blocks) - 2


@pytest.mark.parametrize("name", ["kv8", "kv4"])
def test_a_sliding_layer_gives_back_blocks_that_no_query_sees(name: str) -> None:
    window = 170
    paged, plain = (layer_of(KV_SCHEMES[name], [0, 250], 300, storage, window) for storage in (64, None))
    sizes = []
    for step in range(300):
        for layer in (paged, plain):
            add(layer, 1, step)
        sizes.append(len(pages_of(paged).num_users))
        if step % 60 == 59:
            query = states(1, step, 2)
            outputs = [packed_attention(query, layer, 0.2) for layer in (paged, plain)]
            torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert sizes[-1] == sizes[-100]
    assert max(map(len, pages_of(paged).blocks)) <= -(-window // 64) + 1
    assert min(paged.num_dropped) >= 64


def test_sequences_that_were_one_share_blocks_until_they_write() -> None:
    layer = layer_of(KV8, [0], 300)
    alone = layer.nbytes - layer.room_nbytes - layer.storage.nbytes
    layer.batch_repeat_interleave(4)
    pages = pages_of(layer)
    assert pages.num_users.count(4) == 5
    assert layer.nbytes - layer.room_nbytes - pages.nbytes == alone
    before = [x.clone() for x in stored(layer)]
    add(layer, 1)
    assert pages_of(layer).num_users.count(4) == 4
    assert pages.num_users.count(1) == 4
    layer.crop(-1)
    assert all(map(torch.equal, stored(layer), before))
    layer.batch_select_indices(torch.tensor([2]))
    assert pages_of(layer).num_users.count(1) == 5


def test_the_pool_grows_by_a_quarter_so_that_few_steps_copy_it() -> None:
    layer, places = layer_of(KV8, [0, 0], 320), set()
    for step in range(320):
        add(layer, 1, step)
        places.add(layer.sides[0].planes.codes.data_ptr())
    assert len(places) <= 5
    pages = pages_of(layer)
    assert len(pages.num_users) <= 1.25 * sum(map(len, pages.blocks)) + 1


@pytest.mark.parametrize("block_tokens", [0, -64, 48])
def test_blocks_that_groups_do_not_fill_are_refused(block_tokens: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    with pytest.raises(RequestError, match=f"block_tokens={block_tokens}: blocks have a multiple of 32 tokens"):
        quantized_cache(model, "kv8", block_tokens=block_tokens)
