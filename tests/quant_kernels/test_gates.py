"""What the compiler makes of the kernels: no spills, the right instructions, and no more of them than recorded."""

from __future__ import annotations

import importlib.util
import os
import re
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


@pytest.fixture(scope="module")
def operators() -> tuple[str, ...]:
    """Those of the script."""
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "scripts" / "compile_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.OPERATORS


def test_every_file_with_a_kernel_is_compiled_ahead_of_time(operators: tuple[str, ...]) -> None:
    kernel = re.compile(r"^@triton\.jit\ndef \w+_kernel\(", re.MULTILINE)
    files = (ROOT / "quant_kernels").glob("*.py")
    assert {file.stem for file in files if kernel.search(file.read_text(encoding="utf-8"))} == {*operators}


def test_every_operator_has_kernels_that_are_compiled_on_every_commit(operators: tuple[str, ...]) -> None:
    for operator in operators:
        gates = importlib.import_module(f"quant_kernels.{operator}").gates()
        assert {gate.capability for gate in gates} == {80, 90}
        assert any(gate.representative and gate.capability == 90 for gate in gates), operator


@pytest.mark.slow
def test_the_representative_kernels_compile_as_recorded(compiled_kernels: Path, operators: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), "--representative"]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(compiled_kernels)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    gates = [gate for name in operators for gate in importlib.import_module(f"quant_kernels.{name}").gates()]
    assert len(done.stdout.splitlines()) == sum(gate.representative for gate in gates)
