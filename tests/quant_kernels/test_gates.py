"""What the compiler makes of the kernels: no spills, the right instructions, and no more of them than recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from quant_kernels.gate import Compiled, Gate, Variant, inner_loop, problems

ROOT = Path(__file__).resolve().parents[2]
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R4.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R8, R2, R4, R8 ;
        /*0030*/                   NOP ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""
VARIANT = Variant(kernel=None, signature={}, constants={}, aligned=(), num_warps=1, num_stages=1, weights=32)


def gate(**fields: object) -> Gate:
    return Gate(**{"name": "g", "variant": VARIANT, "capability": 90, "opcode": "HMMA"} | fields)  # type: ignore[arg-type]


def compiled(**fields: object) -> Compiled:
    loop = Counter({"HMMA.16816.F32": 2, "LDG.E": 1})
    usual = {"registers": 64, "stack": 0, "shared": 1 << 10, "loop": loop, "threads": 32}
    return Compiled(**usual | fields)  # type: ignore[arg-type]


def test_the_inner_loop_is_the_shortest_with_all_matrix_instructions() -> None:
    assert inner_loop(CODE) == Counter({"HMMA.16816.F32": 1, "BRA": 1})


def test_a_kernel_as_recorded_passes() -> None:
    assert problems(gate(instructions_per_weight=3.0), compiled()) == []


@pytest.mark.parametrize(
    ("gate", "compiled", "words"),
    [
        (gate(), compiled(stack=64), "spills 64 bytes"),
        (gate(), compiled(shared=1 << 20), "1048576 bytes of shared memory of 232448"),
        (gate(opcode="HGMMA"), compiled(), "does not use HGMMA but HMMA"),
        (gate(instructions_per_weight=2.7), compiled(), "issues 3.00 instructions per weight, 2.7 were recorded"),
    ],
)
def test_what_is_worse_is_said(gate: Gate, compiled: Compiled, words: str) -> None:
    (problem,) = problems(gate, compiled)
    assert words in problem


@pytest.mark.slow
def test_the_representative_kernels_compile_as_recorded(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), "--representative"]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok" in done.stdout
