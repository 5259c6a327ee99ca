"""Aligning heads changes nothing, nor does merging heads that do the same; others are merged at the least loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.core.channels import reconstruct
from compress.core.heads import (
    SMALLEST,
    Attention,
    grouping,
    key_scalars,
    merged,
    regrouped,
    scaled_keys,
    similarity,
    to_gqa,
    turned_values,
    value_rotations,
)
from compress.core.stiefel import deviation

D, WIDTH = 8, 24
"""Channels of a head, and of the inputs."""
every_layout = pytest.mark.parametrize(("heads", "queries"), [(4, 1), (6, 1), (4, 2)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 60, seed: int = 0) -> Tensor:
    return normal(tokens, WIDTH, seed=seed) @ normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def attention(heads: int, queries: int = 1, seed: int = 0) -> Attention:
    rows = heads * D
    parts = [normal(n, WIDTH, seed=seed + i) / WIDTH**0.5 for i, n in enumerate((rows * queries, rows, rows))]
    return Attention(*parts, normal(16, rows * queries, seed=seed + 3), D)


def rotated(x: Tensor) -> Tensor:
    """Rotary embeddings of [tokens, heads, channels], Llama's layout."""
    angle = torch.arange(len(x)).double().unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, x.shape[-1] // 2).double()
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def heads_output(a: Attention, x: Tensor) -> Tensor:
    """What the output projection reads, [tokens, queries], causal."""
    q, k, v = ((x @ weight.T).unflatten(1, (-1, a.head_dim)) for weight in (a.query, a.key, a.value))
    shared = q.shape[1] // k.shape[1]
    q, k, v = rotated(q), rotated(k).repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / a.head_dim**0.5
    masked = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", masked.softmax(-1), v).flatten(1)


def forward(a: Attention, x: Tensor) -> Tensor:
    return heads_output(a, x) @ a.output.T


def loss(a: Attention, b: Attention, x: Tensor) -> float:
    return float((forward(a, x) - forward(b, x)).square().sum() / forward(a, x).square().sum())


def rotations(heads: int, seed: int = 7) -> Tensor:
    return torch.linalg.qr(normal(heads, D, D, seed=seed)).Q


def scalars(heads: int, seed: int = 8) -> Tensor:
    return torch.polar(normal(heads, D // 2, seed=seed).exp(), 3 * normal(heads, D // 2, seed=seed + 1))


# ---- laws --------------------------------------------------------------------------------------------------------


@every_layout
def test_moving_turning_and_scaling_heads_preserves_the_function(heads: int, queries: int) -> None:
    a, x = attention(heads, queries), inputs()
    groups = torch.randperm(heads, generator=torch.Generator().manual_seed(0)).view(2, -1)
    moved = regrouped(a, groups)
    turned = turned_values(moved, rotations(heads))
    scaled = scaled_keys(turned, scalars(heads))
    for other in (moved, turned, scaled):
        assert_close(forward(other, x), forward(a, x), rtol=0, atol=1e-12)
    assert not torch.equal(moved.key, a.key)
    assert (turned.value - moved.value).norm() > 0.5 * a.value.norm()
    assert (scaled.key - turned.key).norm() > 0.5 * a.key.norm()


def test_channels_of_a_key_that_are_no_pair_cannot_be_mixed() -> None:
    """That the attention above has rotary embeddings: a turn of whole heads would be none of its symmetries."""
    a, x = attention(4), inputs()
    R = rotations(4)
    q, k = ((R @ weight.unflatten(0, (4, -1))).flatten(0, 1) for weight in (a.query, a.key))
    assert loss(a, replace(a, query=q, key=k), x) > 1e-3


@every_layout
@pytest.mark.parametrize("num_groups", [1, 2, "all"])
def test_the_alignment_that_merging_wants_preserves_the_function(heads: int, queries: int, num_groups: int) -> None:
    a, x = attention(heads, queries), inputs()
    count = heads if num_groups == "all" else num_groups
    aligned, grouped = to_gqa(a, gram(x), count)
    assert_close(forward(aligned, x), forward(a, x), rtol=0, atol=1e-12)
    assert (grouped.num_heads, grouped.num_queries) == (count, heads * queries // count)
    if count == heads:
        assert_close(forward(grouped, x), forward(a, x), rtol=0, atol=1e-12)


def disguised(queries: int = 1, noise: float = 0.0, seed: int = 0) -> Attention:
    """Six heads: two of keys and values, each in three disguises, in a mixed order."""
    a = attention(6, queries, seed)
    sources = attention(2, seed=seed + 20)
    key, value = (
        w.unflatten(0, (2, -1)).repeat_interleave(3, dim=0).flatten(0, 1) for w in (sources.key, sources.value)
    )
    a = replace(a, key=key + noise * normal(*key.shape, seed=30), value=value + noise * normal(*key.shape, seed=31))
    a = scaled_keys(turned_values(a, rotations(6)), scalars(6))
    return regrouped(a, torch.tensor([[3, 0, 5], [1, 4, 2]]))


@pytest.mark.parametrize("queries", [1, 2])
def test_heads_that_are_one_in_disguise_are_found_and_merged_without_loss(queries: int) -> None:
    a, x = disguised(queries), inputs()
    found = similarity(a, gram(x))
    assert_close(found.diagonal(), torch.ones(6, dtype=torch.float64))
    groups = grouping(found, 2)
    assert sorted(map(tuple, groups.tolist())) == [(0, 2, 4), (1, 3, 5)]
    _, grouped = to_gqa(a, gram(x), 2)
    assert_close(forward(grouped, x), forward(a, x), rtol=0, atol=1e-9)
    plain = regrouped(a, groups)
    assert loss(plain, merged(plain, 2, torch.full((6, D // 2), 1 / 3).double()), x) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_heads_that_are_almost_one_are_merged_at_a_small_loss_and_refitting_lowers_it(seed: int) -> None:
    a, x = disguised(noise=0.02, seed=seed), inputs(500)
    aligned, grouped = to_gqa(a, gram(x), 2)
    z, merged_z = heads_output(aligned, x), heads_output(grouped, x)
    output, _ = reconstruct(aligned.output, gram(merged_z), torch.arange(z.shape[1]), z.T @ merged_z / len(x))
    assert loss(a, grouped, x) < 0.05
    assert loss(a, replace(grouped, output=output), x) < 0.95 * loss(a, grouped, x)


# ---- grouping ----------------------------------------------------------------------------------------------------


def partitions(heads: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    if not heads:
        yield []
    for rest in combinations(heads[1:], size - 1) if heads else ():
        group = (heads[0], *rest)
        for others in partitions(tuple(head for head in heads if head not in group), size):
            yield [group, *others]


@pytest.mark.parametrize(("heads", "num_groups"), [(6, 3), (6, 2), (8, 2), (8, 4), (5, 1), (5, 5)])
def test_groups_are_of_equal_size_and_nearly_as_similar_as_groups_can_be(heads: int, num_groups: int) -> None:
    exact = 0
    for seed in range(10):
        S = normal(heads, heads, seed=seed).abs()
        S = S + S.T
        groups = grouping(S, num_groups)
        assert groups.shape == (num_groups, heads // num_groups)
        assert groups.flatten().sort().values.tolist() == list(range(heads))
        within = [sum(float(S[pair]) for g in every for pair in combinations(g, 2))
                  for every in partitions(tuple(range(heads)), heads // num_groups)]  # fmt: skip
        found = sum(float(S[pair]) for group in groups.tolist() for pair in combinations(group, 2))
        assert found >= 0.9 * max(within)
        exact += found >= max(within) - 1e-9
    assert exact >= 7


def test_equal_similarities_group_neighbours_the_same_way_every_time() -> None:
    groups = grouping(torch.ones(8, 8), 4)
    assert groups.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_similarity_does_not_know_disguises() -> None:
    a, H = attention(4), gram(inputs())
    other = scaled_keys(turned_values(a, rotations(4)), scalars(4))
    assert_close(similarity(other, H), similarity(a, H))
    found = similarity(a, H)
    assert_close(found, found.T)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-12


# ---- alignment ---------------------------------------------------------------------------------------------------


def test_two_heads_of_values_are_aligned_by_procrustes() -> None:
    a, x = attention(2), inputs()
    A = value_rotations(a, gram(x), 1)
    assert max(map(deviation, A)) < 1e-12
    v, w = ((x @ part.T) for part in a.value.unflatten(0, (2, -1)))
    best = torch.linalg.svdvals(v.T @ w).sum()
    assert float(((v @ A[0].T) * (w @ A[1].T)).sum()) == pytest.approx(float(best), rel=1e-9)


@every_layout
def test_aligned_values_are_nearer_to_their_mean(heads: int, queries: int) -> None:
    a, x = attention(heads, queries), inputs()

    def spread(value: Tensor) -> float:
        groups = (x @ value.T).unflatten(1, (2, -1, D))
        return float((groups - groups.mean(dim=2, keepdim=True)).square().sum())

    turned = turned_values(a, value_rotations(a, gram(x), 2))
    assert spread(turned.value) < 0.95 * spread(a.value)
    assert turned.value.norm() == pytest.approx(float(a.value.norm()))


def score_error(a: Attention, x: Tensor, c: Tensor, r: Tensor) -> float:
    """Σ_h E|q_hj|² E|k_hj - c_hj r_j|², of one group."""
    q, k = ((x @ weight.T).unflatten(1, (-1, 2, D // 2)) for weight in (a.query, a.key))
    weight = q.square().sum(dim=2).unflatten(1, (a.num_heads, -1)).sum(dim=2).mean(dim=0)
    return float((weight * (torch.complex(*k.unbind(2)) - c * r.unsqueeze(1)).abs().square()).sum())


@pytest.mark.parametrize("queries", [1, 2])
def test_no_other_key_and_scalars_leave_less_error_of_scores(queries: int) -> None:
    a, x = attention(3, queries), inputs()
    c, shares = key_scalars(a, gram(x), 1)
    r = torch.complex(*(x @ merged(scaled_keys(a, c), 1, shares).key.T).unflatten(1, (2, -1)).unbind(1))
    least = score_error(a, x, c, r)
    assert_close(shares.sum(dim=0), torch.ones(D // 2, dtype=torch.float64))
    for seed in range(40):
        size = 10.0 ** -(seed % 4)
        other = c * (1 + size * torch.complex(normal(3, D // 2, seed=seed), normal(3, D // 2, seed=seed + 1)))
        nudged = r + size * r.abs().mean() * torch.complex(normal(*r.shape, seed=seed), normal(*r.shape, seed=seed + 1))
        assert least <= min(score_error(a, x, other, r), score_error(a, x, c, nudged), score_error(a, x, other, nudged))
    mean = torch.complex(*(x @ a.key.T).unflatten(1, (-1, 2, D // 2)).unbind(2)).mean(dim=1)
    assert least < 0.9 * score_error(a, x, torch.ones_like(c), mean)


def test_how_keys_and_queries_share_their_scale_does_not_matter() -> None:
    a, x = attention(4), inputs()
    scale = torch.logspace(-0.3, 0.3, 4, dtype=torch.float64).unsqueeze(1) * torch.ones(4, D // 2)
    rescaled = scaled_keys(a, torch.complex(scale, torch.zeros_like(scale)))
    first, second = (to_gqa(each, gram(x), 2)[1] for each in (a, rescaled))
    assert_close(forward(first, x), forward(second, x), rtol=0, atol=1e-9)


def test_scalars_are_bounded_where_a_head_has_nothing_in_common_with_its_group() -> None:
    a, x = attention(2), torch.eye(WIDTH, dtype=torch.float64)
    key = torch.zeros_like(a.key)
    key[:D, :D], key[D:, D : 2 * D] = torch.eye(D), 1e-4 * torch.eye(D)
    c, shares = key_scalars(replace(a, key=key), gram(x), 1)
    assert float(shares.min()) == pytest.approx(SMALLEST**2 / (2 + SMALLEST**2))
    assert c.isfinite().all()
    assert c.abs().min() > 0


def test_heads_of_zeros_are_merged_without_a_number_that_is_none() -> None:
    a, x = attention(4), inputs()
    for name in ("query", "key", "value"):
        weight = getattr(a, name).clone()
        weight[D : 2 * D] = 0
        a = replace(a, **{name: weight})
    aligned, grouped = to_gqa(a, gram(x), 2)
    assert_close(forward(aligned, x), forward(a, x), rtol=0, atol=1e-12)
    assert forward(grouped, x).isfinite().all()
    zero = Attention(*(torch.zeros_like(w) for w in (a.query, a.key, a.value, a.output)), D)
    assert not forward(to_gqa(zero, gram(x), 2)[1], x).any()


def test_a_bias_is_one_more_column_at_an_input_that_is_always_one() -> None:
    a = disguised()
    x = torch.cat([inputs()[:, :-1], torch.ones(60, 1, dtype=torch.float64)], dim=1)
    assert_close(forward(to_gqa(a, gram(x), 2)[1], x), forward(a, x), rtol=0, atol=1e-9)


def test_weights_keep_their_dtype_and_what_was_given() -> None:
    a, x = attention(4), inputs()
    a = Attention(*(w.bfloat16() for w in (a.query, a.key, a.value, a.output)), D)
    kept = [w.clone() for w in (a.query, a.key, a.value, a.output)]
    for each in to_gqa(a, gram(x).float(), 2):
        assert {w.dtype for w in (each.query, each.key, each.value, each.output)} == {torch.bfloat16}
    assert all(map(torch.equal, kept, (a.query, a.key, a.value, a.output)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 heads cannot be put into 3 groups of equal size"):
        to_gqa(attention(4), gram(inputs()), 3)
    with pytest.raises(ValueError, match=r"query \[32, 24\], key \[32, 24\], .* no attention with heads of 5 channels"):
        replace(attention(4), head_dim=5)
    with pytest.raises(ValueError, match="no attention with heads of 1 channels"):
        replace(attention(4), head_dim=1)


# ---- a trained model ---------------------------------------------------------------------------------------------


def test_in_a_trained_model_alignment_preserves_the_logits_and_lowers_what_merging_costs(assets: Path) -> None:
    """Four heads of keys and values become two; each is written twice, where its group's were."""
    model = AutoModelForCausalLM.from_pretrained(assets / "models/stories260k").double()
    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260k")
    lines = (assets / "data/calibration.jsonl").read_text().splitlines()[:16]
    texts = [json.loads(line)["text"] for line in lines]
    tokens = tokenizer(texts, return_tensors="pt", truncation=True, max_length=96)["input_ids"]
    layers = [block.self_attn for block in model.model.layers]
    seen: dict[Any, Tensor] = {}
    handles = [
        layer.q_proj.register_forward_hook(lambda module, args, _: seen.update({module: gram(args[0].flatten(0, 1))}))
        for layer in layers
    ]

    def logits(part: slice) -> Tensor:
        with torch.no_grad():
            return model(tokens[part], use_cache=False).logits.log_softmax(-1)

    logits(slice(8))
    for handle in handles:
        handle.remove()
    before = logits(slice(8, 16))
    originals = [
        Attention(
            *(getattr(layer, name).weight.detach().clone() for name in ("q_proj", "k_proj", "v_proj", "o_proj")), 8
        )
        for layer in layers
    ]

    def divergence(attentions: list[Attention]) -> float:
        for layer, a in zip(layers, attentions, strict=True):
            twice = [w.unflatten(0, (a.num_heads, -1)).repeat_interleave(4 // a.num_heads, dim=0).flatten(0, 1)
                     for w in (a.key, a.value)]  # fmt: skip
            for name, weight in zip(("q_proj", "k_proj", "v_proj", "o_proj"), (a.query, *twice, a.output), strict=True):
                getattr(layer, name).weight.data.copy_(weight)
        after = logits(slice(8, 16))
        return float((before.exp() * (before - after)).sum(-1).mean())

    pairs = [to_gqa(a, seen[layer.q_proj], 2) for a, layer in zip(originals, layers, strict=True)]
    assert abs(divergence([aligned for aligned, _ in pairs])) < 1e-10
    half = torch.full((4, 4), 0.5, dtype=torch.float64)
    neighbours = divergence([merged(a, 2, half) for a in originals])
    assert divergence([grouped for _, grouped in pairs]) < 0.8 * neighbours
