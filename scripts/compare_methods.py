#!/usr/bin/env python3
"""netsuke's methods beside each other: one model, one text, the same windows, every row scored from its folder.

    scripts/compare_methods.py --model DIR --calibration FILE --test FILE
    scripts/compare_methods.py --model DIR --calibration FILE --test FILE --rows schemes

Rows differ in one thing at a time, so the table says what each step is worth. It replaces what the results file has
between the two marks of this model; rows that did not help stay in.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import compress
from compress.prune.sparsify import Sparsify
from compress.recipe import Calibration, Evaluation, Recipe

RESULTS = Path(__file__).resolve().parents[1] / "recipes" / "RESULTS.md"

RTN, GPTQ, AWQ, HQQ, SmoothQuant = compress.RTN, compress.GPTQ, compress.AWQ, compress.HQQ, compress.SmoothQuant
AutoRound, Allocate, Rotate, LowRank = compress.AutoRound, compress.Allocate, compress.Rotate, compress.LowRank


def methods(group_size: int | None) -> dict[str, list[Any]]:
    """Name → stages. 4 bits where methods are close, 3 bits where they part; asymmetric grids, as 3 bits want them."""
    four: dict[str, Any] = {"scheme": "w4a16", "group_size": group_size, "symmetric": False}
    three = four | {"scheme": "w3a16"}
    plain = {"range": "minmax", "act_order": True, "sweeps": 0}
    return {
        "4 bits, RTN, min-max": [RTN(**four, range="minmax")],
        "4 bits, RTN, range by squared error": [RTN(**four, range="mse")],
        "4 bits, AWQ, then RTN min-max": [AWQ(), RTN(**four, range="minmax")],
        "4 bits, GPTQ, min-max": [GPTQ(**four, **plain)],
        "4 bits, GPTQ as shipped": [GPTQ(**four)],
        "3 bits, RTN, min-max": [RTN(**three, range="minmax")],
        "3 bits, RTN, range by squared error": [RTN(**three, range="mse")],
        "3 bits, RTN, range by importance": [RTN(**three, range="importance")],
        "3 bits, AWQ, then RTN min-max": [AWQ(), RTN(**three, range="minmax")],
        "3 bits, GPTQ, min-max": [GPTQ(**three, **plain)],
        "3 bits, GPTQ, range by squared error": [GPTQ(**three, **plain | {"range": "mse"})],
        "3 bits, GPTQ, range by importance": [GPTQ(**three, **plain | {"range": "importance"})],
        "3 bits, GPTQ, importance, group-aware order": [
            GPTQ(**three, **plain | {"range": "importance", "act_order": "group"})
        ],
        "3 bits, GPTQ, importance, two sweeps": [GPTQ(**three)],
        "3 bits, the same, by GPTAQ": [GPTQ(**three, asymmetric="gptaq")],
        "3 bits, the same, by Qronos": [GPTQ(**three, asymmetric="qronos")],
        "3 bits, the same, made up for earlier layers": [GPTQ(**three, asymmetric=True)],
        "3 bits, HQQ": [HQQ(**three)],
        "3 bits, RTN, range by importance, rank 8 by SVD": [RTN(**three, range="importance"), LowRank(8, "svd")],
        "3 bits, RTN, range by importance, rank 8 by QERA": [RTN(**three, range="importance"), LowRank(8)],
        "3 bits, GPTQ made up for earlier layers, rank 8 by QERA": [GPTQ(**three, asymmetric=True), LowRank(8)],
        "3 bits, AutoRound": [AutoRound(**three)],
        "4 bits, AutoRound": [AutoRound(**four)],
        "3.5 bits by sensitivity, GPTQ made up for earlier layers": [
            Allocate(3.5),
            GPTQ("w4a16", group_size, asymmetric=True),
        ],
    }


def schemes(group_size: int | None) -> dict[str, list[Any]]:
    """Name → stages, of every scheme that rounds inputs or has float weights."""
    four: dict[str, Any] = {"scheme": "w4a8", "group_size": group_size}
    both: dict[str, Any] = {"scheme": "w4a4", "group_size": group_size}
    return {
        "w8a8, RTN": [RTN("w8a8")],
        "w8a8, GPTQ": [GPTQ("w8a8")],
        "w8a8, SmoothQuant, GPTQ": [SmoothQuant(), GPTQ("w8a8")],
        "w8a8, rotated, GPTQ": [Rotate(), GPTQ("w8a8")],
        "w8a8-static, SmoothQuant, GPTQ": [SmoothQuant(), GPTQ("w8a8-static")],
        "w8a8-static, RTN": [RTN("w8a8-static")],
        "fp8, RTN": [RTN("fp8")],
        "fp8-static, RTN": [RTN("fp8-static")],
        "w4a8, RTN": [RTN(**four)],
        "w4a8, SmoothQuant, GPTQ made up for earlier layers": [SmoothQuant(), GPTQ(**four, asymmetric=True)],
        "w4a4, RTN": [RTN(**both)],
        "w4a4, SmoothQuant, GPTQ made up for earlier layers": [SmoothQuant(), GPTQ(**both, asymmetric=True)],
        "w4a4, rotated, RTN": [Rotate(r4=True), RTN(**both)],
        "w4a4, rotated, GPTQ made up for earlier layers": [Rotate(r4=True), GPTQ(**both, asymmetric=True)],
        "w4a4, rotated, R1 learned, GPTQ made up for earlier layers": [
            Rotate(r4=True, steps=200),
            GPTQ(**both, asymmetric=True),
        ],
        "w4a4, rotated without R4, GPTQ made up for earlier layers": [Rotate(), GPTQ(**both, asymmetric=True)],
        "nvfp4a16, RTN, scales by the maximum": [RTN("nvfp4a16", range="minmax")],
        "nvfp4a16, RTN, scales by importance": [RTN("nvfp4a16", range="importance")],
        "mxfp4a16, RTN, scales by the maximum": [RTN("mxfp4a16", range="minmax")],
        "mxfp4a16, RTN, scales by importance": [RTN("mxfp4a16", range="importance")],
        "nvfp4a16, GPTQ made up for earlier layers": [GPTQ("nvfp4a16", asymmetric=True)],
        "mxfp4a16, GPTQ made up for earlier layers": [GPTQ("mxfp4a16", asymmetric=True)],
        "nvfp4, RTN, scales by importance": [RTN("nvfp4", range="importance")],
    }


def sparse(group_size: int | None) -> dict[str, list[Any]]:
    """Name → stages, of weights with zeros: alone, by shares that differ, and quantized behind it."""
    rows: dict[str, list[Any]] = {}
    for name, pattern in {"2:4": {"pattern": "2:4"}, "50 %": {"sparsity": 0.5}}.items():
        for title, method in {"magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt"}.items():
            rows[f"{name}, {title}"] = [Sparsify(**pattern, method=method, refit=False)]
            rows[f"{name}, {title}, refitted"] = [Sparsify(**pattern, method=method)]
        rows[f"{name}, ALPS, refitted"] = [Sparsify(**pattern, method="alps")]
    plain: dict[str, Any] = {"refit": False}
    for title, given in {"Wanda": plain | {"method": "wanda"}, "SparseGPT": plain, "SparseGPT, refitted": {}}.items():
        rows[f"60 %, {title}"] = [Sparsify(0.6, **given)]
        rows[f"60 %, {title}, by OWL"] = [Sparsify(0.6, **given, owl=True)]
    four = {"scheme": "w4a16", "group_size": group_size}
    for title, quantizer in {"RTN": RTN(**four), "GPTQ": GPTQ(**four)}.items():
        rows[f"2:4, SparseGPT, refitted, then {title} to 4 bits"] = [Sparsify(pattern="2:4"), quantizer]
    return rows


ROWS = {"methods": methods, "schemes": schemes, "sparse": sparse}


def main() -> int:
    options = arguments()
    calibration = Calibration(dataset=str(options.calibration), samples=options.samples, sequence_length=512)
    base = Recipe("rows", (), calibration, Evaluation((str(options.test),), options.windows))
    group_size = options.group_size or None
    lines = ["| row | bits per weight | perplexity | KL divergence | same top token |", "|---|--:|--:|--:|--:|"]
    rows = {name: stages for name, stages in ROWS[options.rows](group_size).items() if options.only in name}
    for name, stages in rows.items():
        with tempfile.TemporaryDirectory() as work:
            recipe = replace(base, stages=tuple(stages))
            try:
                report = compress.run(recipe, model=str(options.model), output=Path(work) / "out")
            except compress.RecipeError as error:
                if "is not a multiple" not in str(error):
                    raise
                lines.append(f"| {name} | | | | its groups do not divide the widths of this model |")
                continue
        text = report["evaluation"]["texts"][0]
        error, bits = text["kl_standard_error"], report["bits_per_weight"]
        lines.append(
            f"| {name} | {f'{bits:.2f}' if bits else ''} | {text['perplexity']:.2f} | "
            f"{text['kl_divergence']:.5f} ± {error:.5f} | {text['top1_agreement']:.1%} |"
        )
        print(lines[-1], file=sys.stderr)
    command = shlex.join(["scripts/compare_methods.py", *map(os.path.basename, sys.argv[1:])])
    grouping = f"groups of {group_size}" if group_size else "one scale per channel"
    context = (
        f"{options.model.name}, {grouping}, {options.samples} × 512 calibration tokens; original perplexity "
        f"{text['baseline_perplexity']:.2f}. {text['tokens']:,} tokens of {options.test.name} scored, ± is the "
        f"standard error over windows. `{command}`"
    )
    if not options.only:
        write(options.rows, options.model.name, "\n".join([context, "", *lines]))
    print("\n".join(lines))
    return 0


def write(rows: str, model: str, table: str) -> None:
    """Put the table between its marks, at the end of the file where there are none yet."""
    begin, end = f"<!-- compare_methods {rows} {model} -->", f"<!-- /compare_methods {rows} {model} -->"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Results\n"
    if begin not in text:
        text += f"\n## {rows.capitalize()} on {model}\n\n{begin}\n{end}\n"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    RESULTS.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="windows of the test text that are scored")
    parser.add_argument("--rows", choices=ROWS, default="methods", help="which table")
    parser.add_argument("--only", default="", help="only rows with this in their name; they are printed, not kept")
    parser.add_argument("--group-size", type=int, default=0, help="columns that share a scale; 0: one per channel")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
