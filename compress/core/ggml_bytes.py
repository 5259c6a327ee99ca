"""The bytes of ggml's blocks: what `compress.core.ggml` found, as llama.cpp lays it out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from compress.core.ggml import Blocks, BlockType

Bytes = UInt8[Tensor, "rows bytes"]


def to_bytes(found: Blocks) -> Bytes:
    """Each row's blocks, one after the other."""
    kind = found.kind
    codes = found.codes.flatten(1).unflatten(1, (-1, kind.size))
    if kind.name == "Q6_K":
        parts = _six_bits(codes), _of_blocks(found.scales, kind).to(torch.int8).view(torch.uint8), _half(found.scale)
        return torch.cat(parts, dim=-1).flatten(1)
    header = [_half(found.scale)] + ([] if found.shift is None else [_half(found.shift)])
    if kind.size == 256:
        header.append(_pairs_of_six_bits(_of_blocks(found.scales, kind), _of_blocks(found.mins, kind)))
        run = 64
    else:
        run = 32
    if kind.name == "Q8_0":
        return torch.cat([*header, codes ^ 128], dim=-1).flatten(1)
    if kind.bits == 5:
        header.append(_fifth_bits(codes, run))
    return torch.cat([*header, _nibbles(codes & 15, run)], dim=-1).flatten(1)


def from_bytes(stored: Bytes, kind: BlockType) -> Blocks:
    """What `to_bytes` was given. Raises ValueError where rows are no whole blocks."""
    if stored.shape[1] % kind.bytes:
        raise ValueError(f"rows of {stored.shape[1]} bytes are no whole blocks of {kind.name}, {kind.bytes} bytes each")
    block = stored.unflatten(1, (-1, kind.bytes))
    parts = kind.size // kind.part

    def coded(codes: Tensor) -> Tensor:
        return codes.flatten(1).unflatten(1, (-1, kind.part)).contiguous()

    if kind.name == "Q6_K":
        scales = block[..., 192:208].contiguous().view(torch.int8).to(torch.int32).flatten(1)
        return Blocks(kind, coded(_from_six_bits(block[..., :192])), _from_half(block[..., 208:]), None, scales, None)
    d, rest = _from_half(block[..., :2]), block[..., 2:]
    shift = scales = mins = None
    if kind.offset:
        shift, rest = _from_half(rest[..., :2]), rest[..., 2:]
    if kind.size == 256:
        scales, mins = _from_pairs_of_six_bits(rest[..., :12])
        rest = rest[..., 12:]
    if kind.name == "Q8_0":
        return Blocks(kind, coded(rest ^ 128), d)
    run = 64 if kind.size == 256 else 32
    low = rest[..., kind.size // 8 :] if kind.bits == 5 else rest
    codes = _from_nibbles(low, run)
    if kind.bits == 5:
        codes = codes | _from_fifth_bits(rest[..., : kind.size // 8], run) << 4
    flat = (value.flatten(1) if value is not None else None for value in (scales, mins))
    return Blocks(kind, coded(codes), d, shift, *flat) if parts > 1 else Blocks(kind, coded(codes), d, shift)


def _half(value: Float[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows blocks 2"]:
    return value.half().contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _from_half(stored: UInt8[Tensor, "rows blocks 2"]) -> Float[Tensor, "rows blocks"]:
    return stored.contiguous().view(torch.float16).squeeze(-1)


def _of_blocks(values: Int[Tensor, "rows parts"] | None, kind: BlockType) -> Int[Tensor, "rows blocks parts"]:
    assert values is not None, "K types have scales of scales"
    return values.unflatten(1, (-1, kind.size // kind.part))


def _nibbles(codes: UInt8[Tensor, "rows blocks size"], run: int) -> UInt8[Tensor, "rows blocks bytes"]:
    """Of each run of codes, the first half in low nibbles and the second in high ones."""
    low, high = codes.unflatten(-1, (-1, 2, run // 2)).unbind(-2)
    return (low | high << 4).flatten(2)


def _from_nibbles(stored: UInt8[Tensor, "rows blocks bytes"], run: int) -> UInt8[Tensor, "rows blocks size"]:
    halves = stored.unflatten(-1, (-1, run // 2))
    return torch.stack([halves & 15, halves >> 4], dim=-2).flatten(2)


def _fifth_bits(codes: UInt8[Tensor, "rows blocks size"], run: int) -> UInt8[Tensor, "rows blocks bytes"]:
    """Simple types: bit i of 32 is of code i. K types: bit j of byte i is of code 32 j + i."""
    bits = (codes >> 4).to(torch.int32)
    if run == 32:
        return _weighted(bits.unflatten(-1, (-1, 8)), -1)
    return _weighted(bits.unflatten(-1, (8, 32)), -2)


def _from_fifth_bits(stored: UInt8[Tensor, "rows blocks bytes"], run: int) -> UInt8[Tensor, "rows blocks size"]:
    places = torch.arange(8, dtype=torch.uint8, device=stored.device)
    if run == 32:
        return (stored.unsqueeze(-1) >> places & 1).flatten(2)
    return (stored.unsqueeze(-2) >> places.unsqueeze(-1) & 1).flatten(2)


def _weighted(bits: Int[Tensor, "*any"], dim: int) -> UInt8[Tensor, "*fewer"]:
    """Eight bits along `dim`, the lowest first, as a byte."""
    places = 1 << torch.arange(8, dtype=torch.int32, device=bits.device)
    shape = [1] * bits.dim()
    shape[dim] = 8
    return (bits * places.view(shape)).sum(dim=dim).to(torch.uint8)


def _pairs_of_six_bits(
    scales: Int[Tensor, "rows blocks 8"], mins: Int[Tensor, "rows blocks 8"]
) -> UInt8[Tensor, "rows blocks 12"]:
    """Four bytes with the low 6 bits of scales 0 to 3, four of mins 0 to 3, four with the low nibbles of the others;
    the upper 2 bits of those are above the first eight."""
    s, n = scales.to(torch.uint8), mins.to(torch.uint8)
    first = s[..., :4] | s[..., 4:] >> 4 << 6
    second = n[..., :4] | n[..., 4:] >> 4 << 6
    third = s[..., 4:] & 15 | (n[..., 4:] & 15) << 4
    return torch.cat([first, second, third], dim=-1)


def _from_pairs_of_six_bits(
    stored: UInt8[Tensor, "rows blocks 12"],
) -> tuple[Int[Tensor, "rows blocks 8"], Int[Tensor, "rows blocks 8"]]:
    first, second, third = stored[..., :4], stored[..., 4:8], stored[..., 8:]
    s = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    n = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return s.to(torch.int32), n.to(torch.int32)


def _six_bits(codes: UInt8[Tensor, "rows blocks 256"]) -> UInt8[Tensor, "rows blocks 192"]:
    """Of each half of 128: low nibbles of codes i and i + 64 in byte i, upper bits of i, i + 32, i + 64, i + 96."""
    quarters = codes.unflatten(-1, (2, 4, 32))
    low = quarters & 15
    nibbles = low[..., :2, :] | low[..., 2:, :] << 4
    upper = quarters >> 4
    two = upper[..., 0, :] | upper[..., 1, :] << 2 | upper[..., 2, :] << 4 | upper[..., 3, :] << 6
    return torch.cat([nibbles.flatten(2), two.flatten(2)], dim=-1)


def _from_six_bits(stored: UInt8[Tensor, "rows blocks 192"]) -> UInt8[Tensor, "rows blocks 256"]:
    nibbles = stored[..., :128].unflatten(-1, (2, 2, 32))
    two = stored[..., 128:].unflatten(-1, (2, 1, 32))
    low = torch.cat([nibbles & 15, nibbles >> 4], dim=-2)
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=stored.device).view(4, 1)
    return (low | (two >> places & 3) << 4).flatten(2)
