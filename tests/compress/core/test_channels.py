"""A score is the loss it promises, what is kept makes up for what went, and sizes are such that kernels like them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.core.channels import (
    channels_of,
    choose,
    flap,
    greedy_obs,
    magnitude,
    obs,
    others,
    reconstruct,
    taylor,
    wanda,
)
from compress.core.linalg import NotPositiveDefinite
from compress.core.metrics import quadratic_error
from compress.errors import NumericalError

Score = Callable[[Tensor, Tensor, int], Tensor]
"""Of a weight [out, in], inputs [tokens, in] and the size of a unit."""
SCORES: dict[str, Score] = {
    "magnitude": lambda W, z, size: magnitude(W, size),
    "wanda": lambda W, z, size: wanda(W, gram(z), size),
    "flap": lambda W, z, size: flap(W, gram(z), z.mean(0), size),
    "taylor": lambda W, z, size: taylor(z, z @ W.T @ W, size),
    "obs": lambda W, z, size: obs(W, gram(z), size),
}
every_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(width: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Correlated, of very different magnitudes, and with a mean."""
    x = normal(tokens, width, seed=seed) @ normal(width, width, seed=seed + 1) + normal(width, seed=seed + 2)
    return x * torch.logspace(-1, 1, width, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def objective(weight: Tensor, part: Tensor, keep: Tensor, hessian: Tensor) -> float:
    """E‖W z - W′ z_S‖²."""
    whole = torch.zeros_like(weight)
    whole[:, keep] = part
    return quadratic_error(weight, whole, hessian)


def refitted(weight: Tensor, hessian: Tensor, keep: Tensor, damping: float = 1e-10) -> float:
    return objective(weight, reconstruct(weight, hessian, keep, damping=damping)[0], keep, hessian)


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_obs_score_is_the_true_rise_of_the_least_squares_objective(size: int) -> None:
    W, z = normal(5, 12), inputs(12)
    expected = []
    for unit in range(12 // size):
        keep = others(channels_of(torch.tensor([unit]), size), 12)
        without = torch.linalg.lstsq(z[:, keep], z @ W.T).solution if len(keep) else z.new_zeros(0, 5)
        expected.append((z @ W.T - z[:, keep] @ without).square().sum() / len(z))
    assert_close(obs(W, gram(z), size, damping=1e-12), torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 3])
def test_damping_adds_to_the_obs_score_what_the_change_of_weights_costs(size: int) -> None:
    W, H = normal(5, 12), gram(inputs(12))
    for unit, score in enumerate(obs(W, H, size, damping=0.1)):
        keep = others(channels_of(torch.tensor([unit]), size), 12)
        metric = damped(H, 0.1)
        assert refitted(W, metric, keep) == pytest.approx(float(score), rel=1e-6)


def test_without_correlation_obs_and_wanda_agree() -> None:
    W, H = normal(5, 12), normal(12).square().diag()
    for size in (1, 4):
        assert_close(obs(W, H, size, damping=1e-12), wanda(W, H, size))


def test_flap_prices_what_a_bias_cannot_make_up_for() -> None:
    W, z = normal(5, 8), inputs(8)
    losses = [(z[:, [j]] - z[:, j].mean()) @ W[:, [j]].T for j in range(8)]
    expected = torch.stack([loss.square().sum() / len(z) for loss in losses])
    assert_close(flap(W, gram(z), z.mean(0)), expected)
    constant = torch.full((50, 8), 3.0, dtype=torch.float64)
    assert_close(flap(W, gram(constant), constant.mean(0)), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_taylor_squares_the_slopes_of_the_loss_in_a_gate_before_the_unit_at_each_token() -> None:
    W, z = normal(5, 8), inputs(8)

    def loss(channels: Tensor) -> Tensor:
        return (channels @ W.T).tanh().square().sum()

    variable = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(variable), variable)
    gates = torch.ones(len(z), 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(z * gates.repeat_interleave(2, dim=1)), gates)
    assert_close(taylor(z, gradient, 2), expected.square().sum(0))
    assert_close(taylor(z[:100], gradient[:100], 2) + taylor(z[100:], gradient[100:], 2), expected.square().sum(0))


def test_at_a_minimum_slopes_cancel_over_the_text_and_taylor_still_tells_what_matters() -> None:
    """A channel that carries a tenth of the others' signal scores least; the sums of slopes are all nothing."""
    z, wanted = normal(400, 8), normal(8, 5, seed=3)
    wanted[6] /= 10
    y = z @ wanted + normal(400, 5, seed=4)
    W = torch.linalg.lstsq(z, y).solution
    gradient = (z @ W - y) @ W.T
    assert (z * gradient).sum(0).abs().max() < 1e-9
    assert int(taylor(z, gradient).argmin()) == 6


@every_score
@pytest.mark.parametrize("size", [1, 3])
def test_a_score_moves_with_its_unit_and_does_not_know_the_order_of_outputs(score: Score, size: int) -> None:
    W, z = normal(5, 12), inputs(12)
    order = torch.randperm(12 // size, generator=torch.Generator().manual_seed(0))
    channels = channels_of(order, size)
    assert_close(score(W[:, channels], z[:, channels], size), score(W, z, size)[order])
    assert_close(score(W.flip(0), z, size), score(W, z, size))


@every_score
def test_a_unit_without_weights_scores_nothing(score: Score) -> None:
    W, z = normal(5, 12), inputs(12)
    W[:, 4:6] = 0
    scores = score(W, z, 2)
    assert scores[2] == 0
    assert choose(scores, 5).tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor", "obs"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_unit_whose_inputs_are_always_zero_scores_nothing(name: str, size: int) -> None:
    W, z = normal(5, 12), inputs(12)
    z[:, 4:6] = 0
    scores = SCORES[name](W, z, size)
    assert (scores == 0).tolist() == [unit * size in (4, 5) for unit in range(12 // size)]
    assert not SCORES[name](W, torch.zeros_like(z), size).any()


@pytest.mark.parametrize("name", ["wanda", "flap", "obs"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_channel_may_be_scaled_where_its_weights_are_scaled_back(name: str, size: int) -> None:
    W, z = normal(5, 12), inputs(12)
    scale = torch.logspace(-0.5, 0.5, 12, dtype=torch.float64)
    score = SCORES[name] if name != "obs" else lambda W, z, size: obs(W, gram(z), size, damping=1e-13)
    assert_close(score(W / scale, z * scale, size), score(W, z, size), rtol=1e-3, atol=0)


# ---- refitting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-8, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("seed", range(4))
def test_refitting_is_never_worse_than_slicing(seed: int, tokens: int, damping: float) -> None:
    W, z = normal(5, 16, seed=seed), inputs(16, tokens, seed)
    z[:, 3] = 0
    drifted = z + 0.3 * inputs(16, tokens, seed + 9)
    drifted[:, 3] = 0
    for count in (1, 2, 8, 15, 16):
        keep = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:count].sort().values
        for before, after, cross in ((z, z, None), (z, drifted, z.T @ drifted / tokens)):
            part, used = reconstruct(W, gram(after), keep, cross, damping=damping)
            assert used == damping
            loss, sliced = (float((before @ W.T - after[:, keep] @ P.T).square().sum()) for P in (part, W[:, keep]))
            assert loss <= sliced * (1 + 1e-12) + 1e-18


@pytest.mark.parametrize("count", [1, 5, 11])
def test_refitting_is_least_squares(count: int) -> None:
    W, z = normal(5, 12), inputs(12)
    drifted = z + 0.3 * inputs(12, seed=5)
    keep = torch.arange(12)[-count:]
    expected = torch.linalg.lstsq(drifted[:, keep], z @ W.T).solution.T
    part, _ = reconstruct(W, gram(drifted), keep, z.T @ drifted / len(z), damping=1e-13)
    assert_close(part, expected, rtol=1e-5, atol=1e-6)
    assert_close(reconstruct(W, gram(z), keep, gram(z))[0], reconstruct(W, gram(z), keep)[0])


def test_with_centred_moments_refitting_finds_the_intercept_as_well() -> None:
    W, z = normal(5, 12), inputs(12)
    keep, mean = torch.arange(7), z.mean(0)
    part, _ = reconstruct(W, gram(z) - mean.outer(mean), keep, damping=1e-13)
    bias = W @ mean - part @ mean[keep]
    ones = torch.ones(len(z), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([z[:, keep], ones], dim=1), z @ W.T).solution.T
    assert_close(torch.cat([part, bias.unsqueeze(1)], dim=1), expected, rtol=1e-5, atol=1e-6)


def test_a_channel_that_others_can_express_goes_for_nothing() -> None:
    W, z = normal(5, 12), inputs(12)
    z[:, 4] = z[:, [0, 1]] @ torch.tensor([2.0, -1.0], dtype=torch.float64)
    keep = others(torch.tensor([4]), 12)
    assert refitted(W, gram(z), keep) < 1e-9 * objective(W, W[:, keep], keep, gram(z))
    part, _ = reconstruct(W, gram(z), keep, damping=1e-10)
    assert_close(
        (part - W[:, keep])[:, :2], W[:, [4]] * torch.tensor([2.0, -1.0], dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_weights_that_nothing_speaks_for_changing_stay_to_the_bit() -> None:
    W, z = normal(5, 12).float(), inputs(12)
    assert torch.equal(reconstruct(W, gram(z), torch.arange(12))[0], W)
    z[:, [2, 5]] = 0
    keep = torch.tensor([0, 2, 7])
    assert torch.equal(reconstruct(W, gram(z), keep)[0][:, 1], W[:, 2]), "a dead channel knows nothing"
    assert torch.equal(reconstruct(W, gram(z), torch.tensor([2, 5]))[0], W[:, [2, 5]]), "none of the kept is alive"
    assert torch.equal(reconstruct(W, torch.zeros(12, 12), keep)[0], W[:, keep])
    assert torch.equal(reconstruct(W, normal(12).square().diag(), keep)[0], W[:, keep]), "no correlation"


def test_damping_is_raised_where_the_hessian_cannot_be_factored_otherwise() -> None:
    H = torch.eye(12, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    W, keep = normal(5, 12), torch.tensor([0, 1, 2])
    part, used = reconstruct(W, H, keep, damping=0.01)
    assert used == pytest.approx(0.1)
    assert torch.equal(part, W[:, keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refitted_weights_have_the_dtype_of_the_weight_and_nothing_is_written_to(dtype: torch.dtype) -> None:
    W, H, G = normal(5, 12).to(dtype), gram(inputs(12)).float(), gram(inputs(12, seed=1)).float()
    before = [tensor.clone() for tensor in (W, H, G)]
    assert reconstruct(W, H, torch.arange(6), G)[0].dtype == dtype
    greedy_obs(W, H, 6)
    obs(W, H, 3)
    assert all(torch.equal(*pair) for pair in zip((W, H, G), before, strict=True))


# ---- elimination -------------------------------------------------------------------------------------------------


def twins(width: int = 24) -> tuple[Tensor, Tensor]:
    """Half of the channels do what the other half does, almost: W and z."""
    z = inputs(width // 2)
    return normal(8, width), torch.cat([z, z + 1e-3 * z.std(0) * normal(*z.shape, seed=7)], dim=1)


def test_one_at_a_time_a_channel_and_its_twin_do_not_both_go() -> None:
    W, z = twins()
    H = gram(z)
    left = greedy_obs(W, H, 12, damping=1e-9, batch=0.01)
    assert sorted((left % 12).tolist()) == list(range(12))
    at_once = choose(obs(W, H, damping=1e-9), 12)
    assert refitted(W, H, left) < 0.01 * refitted(W, H, at_once)


@pytest.mark.parametrize("seed", range(5))
def test_among_redundant_channels_greedy_elimination_loses_least(seed: int) -> None:
    z = normal(800, 32, seed=seed) @ normal(32, 48, seed=seed + 1) + 0.5 * normal(800, 48, seed=seed + 2)
    W, H = normal(16, 48, seed=seed + 50) * normal(48, seed=seed + 3).exp(), gram(z)
    sets = {
        "greedy": greedy_obs(W, H, 24, damping=1e-9),
        **{name: choose(SCORES[name](W, z, 1), 24) for name in ("obs", "wanda", "magnitude")},
    }
    loss = {name: refitted(W, H, keep) for name, keep in sets.items()}
    assert loss["greedy"] < 0.98 * min(loss["obs"], loss["wanda"], loss["magnitude"])
    for name, keep in sets.items():
        assert loss[name] < 0.4 * objective(W, W[:, keep], keep, H)


@pytest.mark.parametrize("size", [1, 2])
def test_greedy_elimination_comes_close_to_the_best_set(size: int) -> None:
    H = gram(inputs(10))
    for seed in range(5):
        W = normal(4, 10, seed=seed)
        sets = [channels_of(torch.tensor(units), size) for units in combinations(range(10 // size), 5 // size)]
        losses = sorted(refitted(W, H, keep) for keep in sets)
        found = channels_of(greedy_obs(W, H, 5 // size, size, damping=1e-10), size)
        assert refitted(W, H, found) <= losses[len(losses) // 20]


@pytest.mark.parametrize(("size", "batch"), [(1, 0.01), (1, 0.05), (4, 0.01), (3, 0.4)])
def test_each_step_of_the_elimination_is_one_from_scratch_on_what_is_left(size: int, batch: float) -> None:
    W, H = normal(6, 24), gram(inputs(24))
    left = torch.arange(24 // size)
    while len(left) > 2:
        channels = channels_of(left, size)
        rest = damped(H, 1e-6)
        part, _ = reconstruct(W, rest, channels, damping=1e-12)
        scores = obs(part, rest[channels][:, channels], size, damping=1e-12)
        left = left[choose(scores, max(2, len(left) - max(1, int(batch * len(left)))))]
    assert torch.equal(greedy_obs(W, H, 2, size, damping=1e-6, batch=batch), left)


def test_elimination_takes_what_is_dead_first_and_keeps_all_or_one() -> None:
    W, z = normal(5, 12), inputs(12)
    z[:, [1, 8]] = 0
    assert greedy_obs(W, gram(z), 10).tolist() == [0, 2, 3, 4, 5, 6, 7, 9, 10, 11]
    assert greedy_obs(W, gram(z), 12).tolist() == list(range(12))
    assert len(greedy_obs(W, gram(z), 1)) == 1
    assert greedy_obs(W, torch.zeros(12, 12), 3).tolist() == [0, 1, 2]
    assert len(greedy_obs(W, gram(inputs(12, tokens=3)), 6)) == 6


def test_elimination_on_a_hessian_without_the_digits_for_it_is_given_up() -> None:
    H = gram(inputs(200, tokens=20)).float()
    with pytest.raises(NotPositiveDefinite, match="Raise the damping, or sum H in float64"):
        greedy_obs(normal(8, 200), H, 2, damping=1e-7)
    assert len(greedy_obs(normal(8, 200), H, 2)) == 2


# ---- choosing ----------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_first_stay() -> None:
    assert choose(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), 3).tolist() == [0, 1, 4]
    assert choose(torch.ones(1000), 10).tolist() == list(range(10))
    assert channels_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda W, H: obs(W, H, 5), ValueError, "units of 5 channels do not divide 12"),
        (lambda W, H: greedy_obs(W, H, 0), ValueError, "0 of 12 units cannot be kept; keep 1 to 12"),
        (lambda W, H: choose(W[0], 13), ValueError, "13 of 12 units"),
        (lambda W, H: choose(W[0] * torch.nan, 3), NumericalError, "12 of 12 scores are NaN"),
        (lambda W, H: obs(W * torch.inf, H), NumericalError, "60 of 60 numbers of the weight are not finite"),
        (lambda W, H: obs(W, H, damping=0), ValueError, "damping=0 must be above 0"),
        (lambda W, H: reconstruct(W, H, torch.arange(3), H * torch.nan), NumericalError, "of the cross moment"),
    ],
)
def test_what_cannot_be_done_is_refused(
    call: Callable[[Tensor, Tensor], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(normal(5, 12), gram(inputs(12)))


# ---- a trained model ---------------------------------------------------------------------------------------------


def test_in_a_trained_model_refitting_pays_on_other_texts_and_greedy_elimination_pays_most(assets: Path) -> None:
    """A quarter of the channels of each MLP goes; the loss is that of the down projection's output."""
    model = AutoModelForCausalLM.from_pretrained(assets / "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260k")
    lines = (assets / "data/calibration.jsonl").read_text().splitlines()[:24]
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1).double())
            )
    with torch.no_grad():
        for line in lines:
            model(
                tokenizer(json.loads(line)["text"], return_tensors="pt", truncation=True, max_length=256)["input_ids"]
            )
    sliced: dict[str, float] = defaultdict(float)
    after: dict[str, float] = defaultdict(float)
    for name, parts in seen.items():
        W = model.get_submodule(name).weight.detach().double()
        z, other = torch.cat(parts[:16]), gram(torch.cat(parts[16:]))
        H = gram(z)
        for score in ("magnitude", "wanda", "flap", "obs", "greedy"):
            keep = greedy_obs(W, H, 128) if score == "greedy" else choose(SCORES[score](W, z, 1), 128)
            sliced[score] += objective(W, W[:, keep], keep, other)
            after[score] += objective(W, reconstruct(W, H, keep)[0], keep, other)
    assert len(seen) == 5
    assert all(after[score] < 0.75 * sliced[score] for score in after)
    assert after["greedy"] == min(after.values())
    assert after["magnitude"] == max(after.values())
