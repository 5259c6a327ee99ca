"""What is asked, and a small model that has learned to answer: from caches that keep it, and from one that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from compress.core.kv import KV_SCHEMES, TOKENS, KVScheme
from compress.core.scheme import Grid
from compress.runtime.attention import quantized_cache
from eval.decode_path import DecodePath
from eval.evaluate import LogitsModel, ScoreError
from eval.journal import Journal
from eval.retrieval import accuracies, answers, copy, draw, key_value, retrieval

KEYS, VALUES = range(160), range(160, 192)
VOCABULARY = len(KEYS) + len(VALUES)
LENGTHS = (336, 384)
TASKS = {
    "key-value": partial(key_value, keys=KEYS, values=VALUES, queries=32, unasked=80),
    "copy": partial(copy, ids=range(VOCABULARY)),
}
FLOATS = KV_SCHEMES["kv2"].window + TOKENS - 1
"""The newest tokens that may be in full precision."""
NAIVE = KVScheme(Grid(2, symmetric=False), Grid(2, symmetric=False))
"""2 bits, a scale for each token and head, and nothing in full precision."""


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lookup(reach: int | None = None) -> LogitsModel:
    """Puts first what followed the same token the last time, if that is one of the newest `reach` tokens."""

    def model(tokens: Tensor, /) -> Tensor:
        logits = torch.zeros(*tokens.shape, VOCABULARY + 1)
        logits[..., VOCABULARY] = 0.5
        for row, ids in enumerate(tokens.tolist()):
            for place, token in enumerate(ids):
                oldest = 0 if reach is None else place + 1 - reach
                found = [ids[at + 1] for at in range(place) if ids[at] == token and at + 1 >= oldest]
                if found:
                    logits[row, place, found[-1]] = 1
        return logits

    return model


def test_a_query_is_one_of_the_oldest_pairs_again() -> None:
    tokens, scored = key_value(60, 5, drawn(), keys=KEYS, values=VALUES, queries=7, unasked=9)
    assert scored.tolist() == [False] * 46 + [False, True] * 7
    for row in tokens.tolist():
        pairs, queries = ([*zip(part[::2], part[1::2], strict=True)] for part in (row[:46], row[46:]))
        assert len({key for key, _ in pairs}) == 23
        assert {key for key, _ in pairs} <= {*KEYS}
        assert {value for _, value in pairs} <= {*VALUES}
        assert len({*queries}) == 7
        assert {*queries} <= {*pairs[:14]}
    assert len({tuple(row) for row in tokens.tolist()}) == 5


def test_a_copy_is_a_run_of_different_tokens_twice() -> None:
    tokens, scored = copy(20, 4, drawn(), ids=range(5, 15))
    assert scored.tolist() == [False] * 11 + [True] * 9
    for row in tokens.tolist():
        assert row[:10] == row[10:]
        assert sorted(row[:10]) == [*range(5, 15)]


def test_what_a_model_expects_before_a_text_counts_as_a_token() -> None:
    for task in (partial(key_value, keys=KEYS, values=VALUES, queries=4), partial(copy, ids=KEYS)):
        tokens, scored = task(20, 3, drawn())
        longer, more = task(21, 3, drawn(), bos=191)
        assert longer[:, 0].tolist() == [191] * 3
        assert torch.equal(longer[:, 1:], tokens)
        assert more.tolist() == [False, *scored.tolist()]


@pytest.mark.parametrize(
    ("task", "length", "options", "message"),
    [
        (key_value, 21, {"queries": 3}, "length=21, .*Use 12 tokens, or an even number more"),
        (key_value, 20, {"queries": 3, "bos": 0}, "Use 13 tokens, or an even number more"),
        (key_value, 16, {"queries": 3, "unasked": 3}, "unasked=3: .*Use 18 tokens"),
        (key_value, 16, {"queries": 0}, "queries=0"),
        (key_value, 16, {"queries": 1, "unasked": -1}, "unasked=-1"),
        (key_value, 340, {"queries": 8}, "162 pairs and there are 160 keys.* Use at most 336 tokens"),
        (key_value, 16, {"queries": 2, "values": range(159, 170)}, "share ids"),
        (copy, 7, {}, "length=7: .* are 4, 6, … 20 tokens long"),
        (copy, 2, {}, "4, 6, … 20"),
        (copy, 22, {}, "out of 10, are 4, 6, … 20"),
        (copy, 23, {"bos": 11}, "out of 10, are 5, 7, … 21"),
    ],
)
def test_a_length_that_cannot_be_is_refused(task: Any, length: int, options: dict[str, Any], message: str) -> None:
    ids = {"keys": KEYS, "values": VALUES} if task is key_value else {"ids": range(10)}
    with pytest.raises(ValueError, match=message):
        task(length, 2, drawn(), **ids | options)


def test_the_least_length_that_an_error_names_is_possible() -> None:
    assert key_value(18, 2, drawn(), keys=KEYS, values=VALUES, queries=3, unasked=3).tokens.shape == (2, 18)
    assert copy(21, 2, drawn(), ids=range(10), bos=11).tokens.shape == (2, 21)


def test_a_model_that_looks_up_is_always_right() -> None:
    rows = retrieval(lookup(), TASKS, LENGTHS, samples=2)
    assert [(row["task"], row["length"]) for row in rows] == [(task, n) for task in TASKS for n in LENGTHS]
    assert {(row["accuracy"], row["standard_error"], row["samples"]) for row in rows} == {(1.0, 0.0, 2)}


def test_answers_lie_as_far_back_as_they_should() -> None:
    task = {"key-value": partial(key_value, keys=KEYS, values=VALUES, queries=8, unasked=10)}
    (near,), (far,) = (retrieval(lookup(reach), task, [80], samples=4) for reach in (20, 80))
    assert (near["accuracy"], far["accuracy"]) == (0, 1)
    assert all(row["accuracy"] == 0 for row in retrieval(lookup(FLOATS), TASKS, LENGTHS, samples=2))


def test_rows_do_not_depend_on_other_rows_or_on_batches() -> None:
    model = lookup(40)
    task = {"key-value": partial(key_value, keys=KEYS, values=VALUES, queries=8)}
    rows = retrieval(model, {"copy": TASKS["copy"], **task}, [32, 64], samples=5)
    assert 0 < rows[3]["accuracy"] < 1
    assert retrieval(model, task, [64], samples=5, batch_size=2) == rows[3:]
    assert retrieval(model, task, [64], samples=5, seed=1) != rows[3:]


def test_the_standard_error_is_that_of_the_mean_over_samples() -> None:
    def model(tokens: Tensor, /) -> Tensor:
        """Is right where the first token of a sequence is even, and never elsewhere."""
        return torch.where(tokens[:, :1, None] % 2 == 0, 1, -1) * lookup()(tokens)

    even = copy(40, 12, drawn(), ids=range(VOCABULARY)).tokens[:, 0] % 2 == 0
    share = even.double().mean().item()
    (row,) = retrieval(model, {"copy": TASKS["copy"]}, [40], samples=12)
    assert 0 < share < 1
    assert row["accuracy"] == pytest.approx(share)
    assert row["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    (single,) = retrieval(model, {"copy": TASKS["copy"]}, [40], samples=1)
    assert single["standard_error"] is None


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ScoreError, match=r"shape \[2, 8\].*logits of shape \[2, 7, 4\]"):
        accuracies(lambda tokens: torch.zeros(2, 7, 4), copy(8, 2, drawn(), ids=KEYS))
    with pytest.raises(ScoreError, match="finite"):
        accuracies(lambda tokens: torch.full((2, 8, 4), torch.nan), copy(8, 2, drawn(), ids=KEYS))
    with pytest.raises(ValueError, match="samples=0"):
        retrieval(lookup(), TASKS, LENGTHS, samples=0)


@pytest.mark.parametrize(("bos", "lengths"), [(None, (32, 64, 128)), (VOCABULARY, (31, 63, 127))])
def test_tasks_are_drawn_at_parts_of_the_context_and_at_all_of_it(bos: int | None, lengths: tuple[int, ...]) -> None:
    found = draw(["recall", "copy"], ids=range(VOCABULARY), bos=bos, context=128, samples=3)
    assert [*found] == [f"{name}-{length}" for name in ("recall", "copy") for length in lengths]
    assert all(sequences.tokens.shape == (3, int(name.split("-")[1])) for name, sequences in found.items())
    assert all(torch.equal(drawn.tokens, again.tokens) for drawn, again in zip(found.values(), draw(
        ["recall", "copy"], ids=range(VOCABULARY), bos=bos, context=128, samples=3).values(), strict=True))  # fmt: skip


def test_answers_are_shares_by_sample() -> None:
    asked = draw(["recall", "copy"], ids=range(VOCABULARY), bos=None, context=64, samples=5)
    for name, answered in answers(lookup(), asked).items():
        assert answered.metrics == {"acc": 1, "acc_stderr": 0, "stderr": 0}, name
        assert answered.values == {"acc": dict.fromkeys(range(5), 1.0)}
    near = answers(lookup(reach=16), asked)["recall-64"]
    assert 0 < near.metrics["acc"] < 1
    shares = accuracies(lookup(reach=16), asked["recall-64"])
    assert [*near.values["acc"].values()] == shares.tolist()
    assert near.metrics["acc_stderr"] == pytest.approx(shares.std().item() / math.sqrt(5))


def test_a_sample_is_asked_once(tmp_path: Path) -> None:
    asked = draw(["copy"], ids=range(VOCABULARY), bos=None, context=16, samples=5)
    first = answers(lookup(), asked, Journal(tmp_path / "journal"))

    def nothing(tokens: Tensor, /) -> Tensor:
        raise AssertionError("asked")

    assert answers(nothing, asked, Journal(tmp_path / "journal")) == first


def trained(longest: int = 384, steps: int = 120, learning_rate: float = 4e-3) -> LlamaForCausalLM:
    """A Llama that copies and looks up: short sequences until it is right in nine of ten, then half as long again.

    Biases on queries and keys let a head find the token before without having to learn it for each token. Lengths vary
    within a stage, without which a copy is found by its distance and not by what it says. The last `steps` are at the
    longest.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY,
        attention_bias=True, initializer_range=0.1, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0)
    generator, length, right, left = drawn(), 16, 0.0, steps
    for step in range(1000):
        quarter = longest // 4 if length == longest else int(torch.randint(2, length // 4 + 1, (), generator=generator))
        count = max(2, 1024 // length)
        asked = key_value(4 * quarter, count, generator, keys=KEYS, values=VALUES, queries=quarter)
        copied = copy(4 * quarter, count, generator, ids=range(VOCABULARY))
        logits = model(torch.cat((asked.tokens, copied.tokens))).logits[:, :-1]
        losses = []
        for part, (tokens, scored) in zip(logits.split(count), (asked, copied), strict=True):
            predicted, expected = part[:, scored[1:]].flatten(0, 1), tokens[:, scored].flatten()
            losses.append(F.cross_entropy(predicted, expected))
            right = 0.95 * right + 0.05 * (predicted.argmax(dim=-1) == expected).float().mean().item()
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 30) * left / steps
        optimizer.step()
        if length == longest:
            left -= 1
        elif right > 0.9:
            length, right = min(longest, length * 3 // 2), 0.6
        if not left:
            return model.eval()
    pytest.fail(f"the model did not learn to retrieve from {length} tokens: it is right in {right:.0%}")


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield trained()
    torch.set_num_threads(before)


def with_outliers(model: LlamaForCausalLM, factor: float, pair: int = 3) -> LlamaForCausalLM:
    """The same function, with two channels of every key that are larger: those that the rotary embedding turns."""
    model = deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for side, by in ((layer.self_attn.k_proj, factor), (layer.self_attn.q_proj, 1 / factor)):
                for each in (side.weight, side.bias):
                    heads = each.unflatten(0, (-1, 2, layer.self_attn.head_dim // 2))
                    heads[:, :, pair] *= by
    return model


def path(model: LlamaForCausalLM, scheme: KVScheme | str | None = None) -> DecodePath:
    if scheme is None:
        return DecodePath(model, lambda: DynamicCache(config=model.config), step=None)
    return DecodePath(model, lambda: quantized_cache(model, scheme), step=None)


def accuracy(model: LogitsModel) -> dict[str, float]:
    """By task, over all lengths."""
    rows = retrieval(model, TASKS, LENGTHS)
    return {task: sum(row["accuracy"] for row in rows if row["task"] == task) / len(LENGTHS) for task in TASKS}


@pytest.fixture(scope="module")
def baseline(model: LlamaForCausalLM) -> dict[str, float]:
    found = accuracy(path(model))
    assert min(found.values()) >= 0.95
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "kept"), [("kv8", 0.99), ("k8v4", 0.99), ("kv4", 0.99), ("kv4-rotated", 0.99), ("kv2", 0.95)]
)
def test_a_cache_keeps_what_is_retrieved_from_it(
    model: LlamaForCausalLM, baseline: dict[str, float], scheme: str, kept: float
) -> None:
    for planted in (model, with_outliers(model, 8)):
        found = accuracy(path(planted, scheme))
        assert all(found[task] >= kept * baseline[task] for task in TASKS), found


@pytest.mark.slow
def test_two_bits_per_token_lose_it_where_keys_have_outliers(
    model: LlamaForCausalLM, baseline: dict[str, float]
) -> None:
    planted = with_outliers(model, 8)
    assert accuracy(path(planted)) == pytest.approx(baseline, abs=0.002)
    found = accuracy(path(planted, NAIVE))
    assert all(found[task] < 0.7 * baseline[task] for task in TASKS), found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["kv4", "kv2"])
def test_keys_per_channel_do_not_change_by_outliers_at_all(model: LlamaForCausalLM, scheme: str) -> None:
    tokens = TASKS["key-value"](LENGTHS[0], 2, drawn()).tokens
    logits = path(model, scheme)(tokens)
    assert torch.equal(path(with_outliers(model, 16), scheme)(tokens), logits)
    assert not torch.equal(path(model)(tokens), logits)
