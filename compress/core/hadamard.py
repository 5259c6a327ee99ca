"""Rotations that spread what is large over all coordinates, of any size, and quick to apply.

A Hadamard matrix has entries of one magnitude, ±1/√n when orthogonal: rotated by it, a single large coordinate becomes
n small ones. For n = 2^k · m it is a Kronecker product of small matrices and is applied one factor at a time, in
n · (sum of the factors' sizes) operations and without ever being written down. The powers of two are Sylvester's. For
an odd m there is Paley's construction where m · 2^j - 1 is a prime ≡ 3 (mod 4), or m · 2^(j-1) - 1 one ≡ 1; otherwise
the discrete cosine transform takes the place of the factor m, orthogonal as well and nearly as flat.

A rotation of the residual stream (QuaRot, arXiv 2404.00456) is Q = diag(±1) K with random signs and K such a product.
It commutes with RMSNorm, which looks at lengths only. LayerNorm subtracts the mean first, and QuaRot turns LayerNorms
into RMSNorms for that reason, which plain transformers then cannot load. Our *centred* Q = K diag(1, ±1 …) Kᵀ has the
vector of ones as a fixed point, since every factor's first column is constant: means stay, and so do LayerNorms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 64
"""Size of the largest factor that powers of two are gathered into."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal Q of size n, applied to vectors in the last dimension."""

    factors: tuple[Float[Tensor, "f f"], ...]
    signs: Float[Tensor, " n"]
    centred: bool = False

    def apply(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        """x Q, in the dtype of x."""
        if self.centred:
            return kronecker(kronecker(x, self.factors) * self.signs.to(x), _transposed(self.factors))
        return kronecker(x * self.signs.to(x), self.factors)

    def undo(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        """x Qᵀ, in the dtype of x."""
        if self.centred:
            return self.apply(x)
        return kronecker(x, _transposed(self.factors)) * self.signs.to(x)


def random_rotation(size: int, generator: torch.Generator, *, centred: bool = False) -> Rotation:
    """A Hadamard rotation with random signs; `centred`: one that keeps the mean of a vector."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    if centred:
        signs[0] = 1
    return Rotation(factors(size), signs, centred)


def hadamard(x: Float[Tensor, "*any n"], size: int) -> Float[Tensor, "*any n"]:
    """Every run of `size` coordinates, a power of two, by Sylvester's matrix; its own inverse."""
    runs = x.unflatten(-1, (-1, size))
    return kronecker(runs, _powers_of_two(size)).flatten(-2)


def kronecker(x: Float[Tensor, "*any n"], matrices: Sequence[Float[Tensor, "f f"]]) -> Float[Tensor, "*any n"]:
    """x (F₁ ⊗ F₂ ⊗ …)."""
    sizes = [len(matrix) for matrix in matrices]
    parts = x.unflatten(-1, sizes) if sizes else x
    for index, matrix in enumerate(matrices):
        dim = index - len(sizes)
        parts = (parts.movedim(dim, -1) @ matrix.to(x)).movedim(-1, dim)
    return parts.flatten(-len(sizes)) if sizes else x


@cache
def factors(size: int) -> tuple[Float[Tensor, "f f"], ...]:
    """Small orthogonal matrices, float64, whose Kronecker product is of this size. Their first columns are constant."""
    odd = size // largest_power_of_two(size)
    if odd == 1:
        return _powers_of_two(size)
    for base in (odd << shift for shift in range(2, (size // odd).bit_length())):
        matrix = _paley(base)
        if matrix is not None:
            return *_powers_of_two(size // base), matrix
    return *_powers_of_two(size // odd), _cosine(odd)


def largest_power_of_two(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


def _powers_of_two(size: int) -> tuple[Float[Tensor, "f f"], ...]:
    """Sylvester's matrix as factors of about equal size."""
    power = size.bit_length() - 1
    count = max(1, -(-power // (LARGEST.bit_length() - 1)))
    powers = [power // count + (index < power % count) for index in range(count)] if power else []
    return tuple(_sylvester(each) for each in powers)


def _sylvester(power: int) -> Float[Tensor, "f f"]:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(len(matrix))


def _paley(size: int) -> Float[Tensor, "f f"] | None:
    """Paley's Hadamard matrix of this size by quadratic residues modulo a prime, None where neither kind exists."""
    if _is_prime(size - 1) and size % 4 == 0:
        matrix = _conference(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    elif size % 4 == 0 and (prime := size // 2 - 1) % 4 == 1 and _is_prime(prime):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(_conference(prime, 1.0), plus) + torch.kron(torch.eye(size // 2, dtype=plus.dtype), minus)
    else:
        return None
    return matrix * matrix[:, :1] / math.sqrt(size)


def _conference(prime: int, below: float) -> Float[Tensor, "n n"]:
    """0 on the diagonal, bordered by 1 above and `below` at the left; elsewhere whether i - j is a square modulo p."""
    squares = {number * number % prime for number in range(1, prime)}
    kind = torch.tensor([0.0, *(1.0 if number in squares else -1.0 for number in range(1, prime))], dtype=torch.float64)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, below
    matrix[1:, 1:] = kind[(torch.arange(prime).unsqueeze(1) - torch.arange(prime)) % prime]
    return matrix


def _cosine(size: int) -> Float[Tensor, "f f"]:
    """The orthogonal cosine transform (DCT-II), a frequency a column."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (index.unsqueeze(1) + 0.5) * index) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _transposed(matrices: Sequence[Float[Tensor, "f f"]]) -> tuple[Float[Tensor, "f f"], ...]:
    return tuple(matrix.T for matrix in matrices)
