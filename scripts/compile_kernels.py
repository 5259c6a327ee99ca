#!/usr/bin/env python3
"""Compile the Triton kernels for the GPUs they are meant for, without one, and hold them to what was recorded.

    scripts/compile_kernels.py                     every shipped configuration
    scripts/compile_kernels.py --representative    the few that are compiled on every commit
    scripts/compile_kernels.py --only wna16        one operator's

Prints registers, shared memory and instructions per weight of each; exit code 1 where one spills, does not fit, misses
its matrix instruction or issues a tenth more instructions than recorded. What ships for Ampere is compiled for an AMD
GPU too, without assembly, and must not spill there either.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from quant_kernels.gate import Gate, amd_problems, compile_nvidia, problems

AMD = "gfx942"
OPERATORS = (
    "wna16",
    "dequantize_words",
    "w8a16",
    "w4a8",
    "hadamard",
    "token_quant",
    "norm_quant",
    "silu_mul_quant",
    "w8a8",
    "fp8",
    "fp8_quant",
    "fp4",
    "experts",
    "kv_decode",
    "kv_append",
    "kv_prefill",
)


def gates(operator: str) -> tuple[Gate, ...]:
    return importlib.import_module(f"quant_kernels.{operator}").gates()


def check(operator: str, index: int) -> tuple[str, bool]:
    """One line about one gate, and whether it passed."""
    gate = gates(operator)[index]
    compiled = compile_nvidia(gate.variant, gate.capability)
    found = problems(gate, compiled)
    per_weight = f"{compiled.instructions_per_weight(gate.variant):.2f}" if gate.variant.weights else "-"
    measured = f"{compiled.registers:>3} registers {compiled.shared:>6} shared {per_weight:>5} per weight"
    if gate.capability == 80:
        found += [f"{AMD}: {problem}" for problem in amd_problems(gate.variant, AMD)]
    return f"sm_{gate.capability} {gate.name:<44} {measured}  {'; '.join(found) or 'ok'}", not found


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time and check what comes out.")
    parser.add_argument("--representative", action="store_true", help="only what is compiled on every commit")
    parser.add_argument("--only", choices=OPERATORS, action="append", help="only these operators")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    wanted = [
        (operator, index)
        for operator in options.only or OPERATORS
        for index, gate in enumerate(gates(operator))
        if gate.representative or not options.representative
    ]
    passed = True
    with ProcessPoolExecutor(options.jobs) as pool:
        for line, good in pool.map(check, *zip(*wanted, strict=True)):
            print(line, flush=True)
            passed = passed and good
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
