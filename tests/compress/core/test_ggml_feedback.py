"""GPTQ on ggml's grids: scales stay, codes make up for each other."""

import pytest
import torch
from torch import Tensor

from compress.core.ggml import TYPES
from compress.core.ggml_bytes import from_bytes, to_bytes
from compress.core.ggml_feedback import fitted_blocks
from compress.core.ggml_search import blocks
from compress.core.metrics import relative_error


def correlated(columns: int, rank: int = 24) -> Tensor:
    inputs = torch.randn(4 * columns, rank) @ torch.randn(rank, columns) + 0.3 * torch.randn(4 * columns, columns)
    return (inputs.T @ inputs / len(inputs)).double()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TYPES)
class TestEveryType:
    def test_correlated_inputs_lose_less_than_by_rounding_each_weight(self, name: str) -> None:
        weight, hessian = torch.randn(48, 256), correlated(256)
        alone, together = blocks(weight, TYPES[name], hessian.diagonal()), fitted_blocks(weight, TYPES[name], hessian)
        lost = [relative_error(weight, found.dequantize(), hessian) for found in (alone, together)]
        assert lost[1] < 0.7 * lost[0]

    def test_with_uncorrelated_inputs_it_is_the_range_search(self, name: str) -> None:
        weight, energy = torch.randn(16, 256), torch.rand(256, dtype=torch.float64) + 0.1
        alone, together = blocks(weight, TYPES[name], energy), fitted_blocks(weight, TYPES[name], energy.diag())
        torch.testing.assert_close(together.dequantize(), alone.dequantize(), rtol=0, atol=1e-6)

    def test_what_it_finds_is_what_a_file_holds(self, name: str) -> None:
        found = fitted_blocks(torch.randn(16, 256), TYPES[name], correlated(256))
        assert torch.equal(from_bytes(to_bytes(found), TYPES[name]).dequantize(), found.dequantize())


def test_inputs_that_were_never_seen_and_rows_of_zeros_are_no_hindrance() -> None:
    weight, hessian = torch.randn(8, 256), correlated(256)
    weight[3] = 0
    hessian[:, 17] = hessian[17] = 0
    found = fitted_blocks(weight, TYPES["Q4_K"], hessian).dequantize()
    assert found.isfinite().all()
    assert not found[3].any()
