"""Which folders are scored from their files, and which by their own loader."""

from __future__ import annotations

from typing import Any

import pytest

from compress.scoring import is_streamed


@pytest.mark.parametrize(
    ("quantization", "streamed"),
    [
        ({}, True),
        ({"quant_method": "compressed-tensors"}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),
        ({"quant_method": "quark"}, False),
    ],
)
def test_a_folder_is_streamed_where_netsuke_reads_its_format(quantization: dict[str, Any], streamed: bool) -> None:
    assert is_streamed(quantization) == streamed
