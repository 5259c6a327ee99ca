"""What a Triton kernel becomes on a GPU, found out without one: compile ahead of time, read the machine code.

On a Hopper GPU a kernel that reads 4-bit weights is limited by the instructions it issues, not by bandwidth, and both
those and registers, stack and shared memory are known once the kernel is compiled. So every shipped configuration is
compiled for the architectures it is meant for, and what is measured is compared with what was recorded. Needs Triton
3.6 or later and the disassembler it brings along; the process must not run Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10}
"""Compute capability → bytes of shared memory that a thread block may have. An A100 has 163 KB; an RTX 30 or 40, which
runs what is compiled for 8.0, has 99."""
AMD_SHARED_LIMIT = 64 << 10
STACK_LIMIT = 16
"""Bytes of stack that are no sign of spilling."""
ALIGNMENT = 16
"""Bytes, or elements of a size, that launches promise divisibility by."""


@dataclass(frozen=True)
class Variant:
    """One configuration of one kernel, as it is launched.

    `signature`: argument → Triton type (`*bf16`, `i32`), constants left out. `aligned`: arguments divisible by 16.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    weights: int = 0
    """Weights that one thread block handles in one round of its inner loop."""


@dataclass(frozen=True)
class Compiled:
    """What an NVIDIA compiler made of a variant."""

    registers: int
    stack: int
    """Bytes spilled per thread."""
    shared: int
    loop: Counter[str]
    """Opcode with its modifiers → instructions per warp in one round of the inner loop: that with the most matrix
    instructions."""
    threads: int

    def instructions_per_weight(self, variant: Variant) -> float:
        """Thread-instructions issued per weight; an H200 at full bandwidth has 3.7 to 4.1 to spend on 4 bits."""
        return self.loop.total() * self.threads / variant.weights

    def uses(self, opcode: str) -> bool:
        """Whether the inner loop has an instruction of this name, `HGMMA` or `IMMA`."""
        return any(name.split(".")[0] == opcode for name in self.loop)


@dataclass(frozen=True)
class Gate:
    """A variant, the architecture it ships for, and what was recorded of it there."""

    name: str
    variant: Variant
    capability: int
    """80 or 90."""
    opcode: str
    """The matrix instruction its loop must use, `HGMMA`; empty: it has none."""
    instructions_per_weight: float | None = None
    """As measured when it was written; a tenth more is a regression. None: not a kernel that is limited by them."""
    representative: bool = False
    """Compiled on every commit; the others by `scripts/compile_kernels.py` alone."""


def problems(gate: Gate, compiled: Compiled) -> list[str]:
    """In what a compiled gate is worse than it may be, in sentences; none is a pass."""
    found = []
    if compiled.stack > STACK_LIMIT:
        found.append(f"spills {compiled.stack} bytes per thread")
    if compiled.shared > SHARED_LIMIT[gate.capability]:
        found.append(f"wants {compiled.shared} bytes of shared memory of {SHARED_LIMIT[gate.capability]}")
    if gate.opcode and not compiled.uses(gate.opcode):
        used = sorted({name.split(".")[0] for name in compiled.loop if "MMA" in name})
        found.append(f"does not use {gate.opcode} but {', '.join(used) or 'no matrix instruction'}")
    recorded = gate.instructions_per_weight
    if recorded and (measured := compiled.instructions_per_weight(gate.variant)) > 1.1 * recorded:
        found.append(f"issues {measured:.2f} instructions per weight, {recorded} were recorded")
    return found


def compile_nvidia(variant: Variant, capability: int) -> Compiled:
    """Compile for `capability`, 80 or 90, and take the machine code apart."""
    built = _compile(variant, GPUTarget("cuda", capability, 32))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _run("nvdisasm", "-c", str(cubin))
    registers, stack = (int(value) for value in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    threads = 32 * int(built.metadata.num_warps)
    return Compiled(registers, stack, int(built.metadata.shared), inner_loop(code), threads)


def amd_problems(variant: Variant, architecture: str = "gfx942") -> list[str]:
    """What is wrong with a variant of Ampere's on an AMD GPU, where it has no assembly and what `tuning.fitted` allows.

    Raises what the compiler raises.
    """
    constants = dict(variant.constants)
    constants |= {name: value for name, value in (("ASM", False), ("BLOCK_K", 128)) if name in constants}
    built = _compile(replace(variant, constants=constants, num_stages=2), GPUTarget("hip", architecture, 64))
    spilled = max(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"]))
    found = []
    if spilled:
        found.append(f"spills {spilled} vector registers")
    if built.metadata.shared > AMD_SHARED_LIMIT:
        found.append(f"wants {built.metadata.shared} bytes of shared memory of {AMD_SHARED_LIMIT}")
    return found


def inner_loop(code: str) -> Counter[str]:
    """Opcodes of the loop with the most matrix instructions, in the disassembly of one kernel; empty where no loop is.

    A loop is what lies between a label and a branch back to it.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[Counter[str]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            instructions.append(found[1])
            target = re.search(r"\(?(\.L_\w+)\)?", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append(Counter(name for name in instructions[labels[target[1]] :] if name != "NOP"))
    return max(loops, key=_matrix_instructions, default=Counter())


def _matrix_instructions(loop: Counter[str]) -> tuple[int, int]:
    """Most first; of loops with as many, the shortest, which is the innermost."""
    return sum(count for name, count in loop.items() if "MMA" in name), -loop.total()


def _compile(variant: Variant, target: GPUTarget) -> Any:
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature, constexprs=dict(variant.constants), attrs=attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout
