from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.core.alps import alps
from compress.core.metrics import quadratic_error, relative_error
from compress.core.refit import refit
from compress.core.sparsegpt import sparsegpt
from compress.core.sparsity import Pattern, keep_largest, magnitude, wanda
from compress.errors import NumericalError

PATTERNS = [Pattern(0.3), Pattern(0.5), Pattern(0.75), Pattern(n=2, m=4), Pattern(n=1, m=4), Pattern(n=4, m=8)]


def weight(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = 64, tokens: int = 2000, seed: int = 1) -> Tensor:
    """A Hessian of inputs that share a few directions and differ in energy, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    energy = torch.logspace(-0.75, 0.75, columns)[torch.randperm(columns, generator=generator)]
    x = (shared + torch.randn(tokens, columns, generator=generator)) * energy
    return (x.T @ x).double() / tokens


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
def test_the_count_is_exact_in_every_group_and_over_the_matrix(pattern: Pattern, block_size: int) -> None:
    result = sparsegpt(weight(), correlated(), pattern, block_size=block_size)
    assert int(result.mask.sum()) == pattern.num_kept(24 * 64)
    assert not result.weight[~result.mask].any()
    assert result.weight[result.mask].all()
    if pattern.m:
        assert (result.mask.view(-1, pattern.m).sum(dim=1) == pattern.n).all()


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_every_block_is_as_sparse_as_the_whole(block_size: int) -> None:
    mask = sparsegpt(weight(), correlated(), Pattern(0.6), block_size=block_size).mask
    for end in range(block_size, 65, block_size):
        assert int(mask[:, :end].sum()) == Pattern(0.6).num_kept(24 * end)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_sparsegpt_equals_the_recursion_of_the_paper(pattern: Pattern) -> None:
    W, H = weight(6, 16), correlated(16)
    result = sparsegpt(W, H, pattern, block_size=8)
    rest, inverse = W.double(), torch.linalg.inv(damped(H))
    unit = pattern.m or 8
    for j in range(16):
        if j % unit == 0:
            energies, shrunk = [], inverse
            for _ in range(unit):
                energies.append(1 / shrunk[0, 0])
                shrunk = (shrunk - torch.outer(shrunk[:, 0], shrunk[0]) / shrunk[0, 0])[1:, 1:]
            cost = rest[:, :unit].square() * torch.stack(energies)
            chosen = result.mask[:, j : j + unit]
            if pattern.m:
                assert torch.equal(keep_largest(cost, pattern), chosen)
            else:
                assert cost[chosen].min() >= cost[~chosen].max()
        level = rest[:, 0] * result.mask[:, j]
        assert torch.allclose(level, result.weight[:, j].double(), atol=1e-5)
        error = rest[:, 0] - level
        rest = (rest - error.unsqueeze(1) * inverse[0] / inverse[0, 0])[:, 1:]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]


def test_the_block_size_changes_only_the_speed_of_groups() -> None:
    W, H, pattern = weight(), correlated(), Pattern(n=2, m=4)
    few, many = (sparsegpt(W, H, pattern, block_size=size) for size in (6, 128))
    assert torch.equal(few.mask, many.mask)
    assert torch.allclose(few.weight, many.weight, atol=1e-4)


def test_with_uncorrelated_inputs_sparsegpt_is_wanda_and_moves_nothing() -> None:
    W, H = weight(), torch.diag(torch.linspace(1, 3, 64, dtype=torch.float64))
    result = sparsegpt(W, H, Pattern(n=2, m=4), damping=1e-9)
    assert torch.equal(result.mask, keep_largest(wanda(W, H.diagonal()), Pattern(n=2, m=4)))
    assert torch.equal(result.weight, W * result.mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("seed", range(3))
def test_knowing_and_doing_more_leaves_less_output_error(pattern: Pattern, seed: int) -> None:
    W, H = weight(64, seed=seed), correlated(seed=seed + 10)
    by_size = W * keep_largest(magnitude(W), pattern, "matrix")
    by_output = W * keep_largest(wanda(W, H.diagonal()), pattern)
    ours = sparsegpt(W, H, pattern)
    ladder = [by_size, by_output, ours.weight, refit(W, H, ours.mask).weight]
    errors = [relative_error(W, each, H) for each in ladder]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[1]
    assert relative_error(W, alps(W, H, pattern).weight, H) <= errors[3] * (1 + 1e-6)


def test_on_trained_weights_each_method_loses_less_than_the_one_before(assets: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models/stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: list[Tensor] = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double()))
    for name in ("calibration", "validation"):
        with (assets / "data" / f"{name}.jsonl").open() as lines:
            text = json.loads(next(lines))["text"][:12000]
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        with torch.no_grad():
            model(tokens[:, : tokens.numel() // 128 * 128].view(-1, 128))
    W = layer.weight.detach()
    H, unseen = (x.T @ x / len(x) for x in seen)
    for pattern in (Pattern(0.5), Pattern(n=2, m=4)):
        ours = sparsegpt(W, H, pattern)
        ladder = [
            W * keep_largest(wanda(W, H.diagonal()), pattern),
            ours.weight,
            refit(W, H, ours.mask).weight,
            alps(W, H, pattern).weight,
        ]
        for measured in (H, unseen):
            errors = [relative_error(W, each, measured) for each in ladder]
            assert errors == sorted(errors, reverse=True)
            assert errors[1] < 0.7 * errors[0]
            assert errors[3] < 0.9 * errors[2]


def test_inputs_that_never_fired_go_first_and_keep_what_stays() -> None:
    W, H = weight(), correlated()
    H[::8] = 0
    H[:, ::8] = 0
    mostly = sparsegpt(W, H, Pattern(0.5), block_size=64)
    assert mostly.mask[:, ::8].float().mean() < 0.1
    few = sparsegpt(W, H, Pattern(0.1), block_size=64)
    kept = few.mask[:, ::8]
    assert kept.any()
    assert torch.equal(few.weight[:, ::8], W[:, ::8] * kept)
    assert few.note is None


def test_a_hessian_of_few_tokens_is_solved_and_still_beats_wanda() -> None:
    W, H = weight(), correlated(tokens=10)
    result = sparsegpt(W, H, Pattern(0.5))
    assert result.note is None
    lost = quadratic_error(W, result.weight, H)
    assert lost < 0.5 * quadratic_error(W, W * keep_largest(wanda(W, H.diagonal()), Pattern(0.5)), H)


def test_more_damping_than_asked_for_is_reported() -> None:
    H = torch.eye(64, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    assert sparsegpt(weight(), H, Pattern(0.5)).damping == pytest.approx(0.1)


@pytest.mark.parametrize("solve", [sparsegpt, alps])
@pytest.mark.parametrize("entry", [9.0, None])
def test_a_hopeless_hessian_ends_in_wanda_and_says_so(solve: object, entry: float | None) -> None:
    W, H = weight(), torch.eye(64, dtype=torch.float64)
    if entry is None:
        H.zero_()
    else:
        H[0, 1] = H[1, 0] = entry
    result = solve(W, H, Pattern(0.5))
    assert "pruned by Wanda, because the Hessian of 64 inputs is not positive definite" in result.note
    assert torch.equal(result.weight, W * keep_largest(wanda(W, H.diagonal()), Pattern(0.5)))


@pytest.mark.parametrize("solve", [sparsegpt, alps])
@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(n=2, m=4)], ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_zeros_of_one_row_and_of_few_inputs_are_pruned(
    solve: object, pattern: Pattern, dtype: torch.dtype
) -> None:
    for W in (torch.zeros(8, 64), weight(1), weight(8, 4), weight(1, 4)):
        result = solve(W.to(dtype), correlated(W.shape[1]), pattern)
        assert int(result.mask.sum()) == pattern.num_kept(W.numel())
        assert result.weight.isfinite().all()
        assert result.weight.dtype == dtype
        assert not result.weight[~result.mask].any()
        assert result.note is None or "SparseGPT" in result.note


@pytest.mark.parametrize("solve", [sparsegpt, alps])
def test_groups_that_do_not_divide_the_inputs_are_refused(solve: object) -> None:
    with pytest.raises(ValueError, match="in_features=62 is not a multiple of m=4"):
        solve(weight(8, 62), correlated(62), Pattern(n=2, m=4))


@pytest.mark.parametrize("solve", [sparsegpt, alps])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(solve: object, poison: float) -> None:
    W, H = weight(), correlated()
    W[2, 3] = poison
    with pytest.raises(NumericalError, match="1 of 1536 numbers of the weight"):
        solve(W, H, Pattern(0.5))
    H[1, 1] = poison
    with pytest.raises(NumericalError, match="1 of 4096 numbers of the hessian"):
        solve(weight(), H, Pattern(0.5))


@pytest.mark.parametrize("solve", [sparsegpt, alps])
@pytest.mark.parametrize("rows", [1, 24])
def test_inputs_are_left_as_they_were(solve: object, rows: int) -> None:
    W, H = weight(rows), correlated()
    before = W.clone(), H.clone()
    solve(W, H, Pattern(0.5))
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
