from __future__ import annotations

import pytest

from compress.core.scheme import FIXED_SCHEMES, FP8, NF4, Grid, Scheme, parse_scheme


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("w4a16", Scheme(Grid(4, group_size=128))),
        ("w8a8", Scheme(Grid(8), Grid(8))),
        ("w8a8-static", Scheme(Grid(8), Grid(8, rows=None))),
        ("w4a8", Scheme(Grid(4, group_size=128), Grid(8))),
        ("w4a4", Scheme(Grid(4, group_size=128), Grid(4))),
        ("w4a8-fp8", Scheme(Grid(4, group_size=128), FP8)),
        ("fp8", Scheme(FP8, FP8)),
        ("nf4", Scheme(NF4)),
    ],
)
def test_a_name_stands_for_its_grids(name: str, scheme: Scheme) -> None:
    assert parse_scheme(name) == scheme


@pytest.mark.parametrize("name", ["w2a16", "w8a16", "w8a8", "w3a8", "w4a4", "w8a8-static", "w4a8-fp8", *FIXED_SCHEMES])
def test_a_scheme_knows_its_name(name: str) -> None:
    assert parse_scheme(name).name == name


def test_the_group_size_may_be_chosen_where_weights_are_integers() -> None:
    assert parse_scheme("w8a8", 64).weights.group_size == 64
    assert parse_scheme("w4a16", None).weights.group_size is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w9a16",), "unknown scheme 'w9a16'; there are w2a16"),
        (("w8a6",), "unknown scheme 'w8a6'"),
        (("w8a4-static",), "unknown scheme"),
        (("w8a16-fp8",), "unknown scheme"),
        (("w4a16", 0), "group_size=0 must be at least 1"),
        (("nvfp4", 32), "nvfp4 is symmetric and has its own group_size=16"),
        (("fp8", "auto", False), "fp8 is symmetric"),
        (("nf4", 128), "nf4 is symmetric and has its own group_size=64"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scheme(*arguments)


def test_a_scale_is_part_of_the_checkpoint_only_where_it_does_not_follow_the_data() -> None:
    static = {name for name in ("w8a8", "w8a8-static", "w4a16", *FIXED_SCHEMES) if parse_scheme(name).static}
    assert static == {"w8a8-static", "fp8-static", "nvfp4"}


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (Grid(4, group_size=32), (300, 8)),
        (Grid(8), (300, 1)),
        (Grid(8, rows=None), (1, 1)),
        (Grid(8, group_size=128, rows=128), (3, 2)),
    ],
)
def test_scales_have_a_row_for_as_many_rows_as_share_one(grid: Grid, shape: tuple[int, int]) -> None:
    assert grid.scale_shape(300, 256) == shape
