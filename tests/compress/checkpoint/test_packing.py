from __future__ import annotations

import pytest
import torch

from compress.checkpoint import packing
from compress.checkpoint.packing import num_words, pack, unpack

BITS = range(1, 9)
COLUMNS = (1, 3, 17, 31, 32, 33, 100)


def words(*values: int) -> torch.Tensor:
    """32-bit words written as unsigned hexadecimal numbers, one row."""
    return torch.tensor([values], dtype=torch.int64).to(torch.int32)


def codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns * 8 + bits)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (4, list(range(-8, 8)), words(0x76543210, 0xFEDCBA98)),
        (3, list(range(-4, 4)) * 4, words(0x88FAC688, 0xC688FAC6, 0xFAC688FA)),
        (8, [-128, -1, 0, 127], words(0xFF807F00)),
        (2, [-2, -1, 0, 1] * 4, words(0xE4E4E4E4)),
    ],
)
def test_words_are_those_of_the_official_packer(bits: int, signed: list[int], expected: torch.Tensor) -> None:
    unsigned = torch.tensor([signed]) + (1 << bits - 1)
    assert torch.equal(pack(unsigned.to(torch.uint8), bits), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_unpack_inverts_pack(bits: int, columns: int) -> None:
    original = codes(5, columns, bits)
    assert torch.equal(unpack(pack(original, bits), bits, columns), original)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_bit_is_where_the_definition_puts_it(bits: int, columns: int) -> None:
    row = codes(1, columns, bits)
    stream = sum(int(code) << index * bits for index, code in enumerate(row[0]))
    packed = [int(word) & 0xFFFFFFFF for word in pack(row, bits)[0]]
    assert packed == [stream >> 32 * index & 0xFFFFFFFF for index in range(num_words(columns, bits))]


@pytest.mark.parametrize("bits", BITS)
def test_chunks_leave_no_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = codes(7, 45, bits)
    whole = pack(original, bits)
    monkeypatch.setattr(packing, "CHUNK", 90)
    assert torch.equal(pack(original, bits), whole)
    assert torch.equal(unpack(whole, bits, 45), original)


def test_transposed_matrices_pack_like_their_copies() -> None:
    original = codes(64, 32, 4)
    assert torch.equal(pack(original.T, 4), pack(original.T.contiguous(), 4))
    packed = pack(original, 4).T.contiguous()
    assert torch.equal(unpack(packed.T, 4, 32), original)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(torch.tensor([[1, 8]], dtype=torch.uint8), 3)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="33 codes of 4 bits take 5 words a row, these rows have 4"):
        unpack(pack(codes(2, 32, 4), 4), 4, 33)


@pytest.mark.parametrize("bits", [0, 9])
def test_more_than_a_byte_or_no_bits_at_all_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}"):
        pack(codes(1, 8, 1), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_official_packer_agrees(bits: int, columns: int) -> None:
    official = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    unsigned = codes(5, columns, bits)
    signed = (unsigned.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(pack(unsigned, bits), official.pack_to_int32(signed, bits))
