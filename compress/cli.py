"""The command line: what each command calls, and printing, nothing else.

Results go to stdout, progress and errors to stderr; `--json` makes stdout one JSON object. Exit codes: 0 done,
1 failed on the way, 2 the request is wrong and nothing was written, 3 done but a gate of the recipe was not met.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.arguments import parser
from compress.errors import NetsukeError, RequestError

GATE_MISSED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one command, and turn what went wrong into a sentence and an exit code."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too; nobody watches them
    arguments = parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except RequestError as error:
        for problem in error.problems:
            _complain(problem)
        return error.exit_code
    except NetsukeError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted. What `netsuke run` had finished is kept; the same command with --resume goes on")
        return 1
    except BrokenPipeError:
        return 0
    except OSError as error:
        _complain(f"{error.filename or 'output'}: {error.strerror or error}")
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _plan(arguments)
    from compress import pipeline
    from compress.progress import Bar
    from compress.report import summary_lines

    with Bar() as bar:
        report = pipeline.run(
            arguments.recipe,
            model=arguments.model,
            output=arguments.output,
            calibration=arguments.calibration,
            overrides=arguments.overrides,
            device=arguments.device,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            progress=bar.show,
        )
    if not report:  # another process of the same launch has it
        return 0
    _print(arguments, report, summary_lines(report))
    unwritten = [export for export in report["exports"] if export.get("error")]
    for export in unwritten:
        _complain(f"{export['output']}: was not written: {export['error']}")
    missed = [gate for gate in report["gates"] if gate["met"] is False]
    for gate in missed:
        _complain(f"gate {gate['name']} not met: {gate['value']}, limit {gate['limit']}")
    return 1 if unwritten else GATE_MISSED if missed else 0


def _plan(arguments: argparse.Namespace) -> int:
    from compress.pipeline import prepare

    plan = prepare(
        arguments.recipe,
        model=arguments.model,
        calibration=arguments.calibration,
        overrides=arguments.overrides,
    ).to_json()
    from compress.tables import plan_table

    _print(arguments, plan, plan_table(plan))
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from compress.recipe import describe, load, shipped

    recipes = shipped()
    if arguments.name is None:
        _print(
            arguments,
            {name: describe(path) for name, path in recipes.items()},
            [(name, describe(path)) for name, path in recipes.items()],
        )
        return 0
    recipe = load(arguments.name)
    text = recipes[arguments.name].read_text() if arguments.name in recipes else Path(arguments.name).read_text()
    if arguments.json:
        _print(arguments, {"name": recipe.name, "recipe": text}, [])
    else:
        sys.stdout.write(text)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from compress.inspection import inspect
    from compress.tables import inspection_table

    found = inspect(Path(arguments.folder))
    _print(arguments, found, inspection_table(found))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from compress.core.ggml import types_said
    from compress.pipeline.convert import convert
    from compress.progress import Bar
    from compress.tables import size

    options = {"overwrite": arguments.overwrite, "calibration": arguments.calibration}
    with Bar() as bar:
        found = convert(arguments.folder, arguments.to, arguments.output, **options, progress=bar.show)
    told = f"{size(found['bytes_before'])} → {size(found['bytes_after'])}"
    lines = [("output", found["output"]), ("format", found["format"]), ("size", told)]
    if found.get("types"):
        how = " by GPTQ" if found["fitted"] else ""
        lines.append(("layers", f"{found['exact']} with codes as they were, {found['requantized']} quantized{how}"))
        lines.append(("", types_said(found["types"])))
    _print(arguments, found, lines)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from compress.progress import Bar
    from compress.report import render_scores
    from compress.scoring import score
    from compress.tables import score_table

    asked = _scored_on(arguments)
    with Bar() as bar:
        result = score(arguments.model, **asked, progress=bar.show)
    _print_scores(arguments, result, score_table(result), render_scores)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from compress.progress import Bar
    from compress.report import render_comparison
    from compress.scoring.compare import compare
    from compress.tables import comparison_table

    asked = _scored_on(arguments)
    with Bar() as bar:
        result = compare(arguments.models, **asked, progress=bar.show)
    _print_scores(arguments, result, comparison_table(result), render_comparison)
    failed = [row for row in result["models"] if "error" in row]
    for row in failed:
        _complain(f"{row['model']}: {row['error']}")
    return 1 if failed else 0


def _scored_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """What to score on. Raises RequestError where the page could not be written after all that work."""
    if arguments.report and not (folder := Path(arguments.report).absolute().parent).is_dir():
        raise RequestError(f"--report {arguments.report}: there is no folder {folder}. Make it, or name another file")
    from compress.scoring.cache import default_folder

    return {
        "baseline": arguments.baseline,
        "texts": [Path(text) for text in arguments.text],
        "tasks": [task for task in (arguments.tasks or "").split(",") if task],
        "context": arguments.context,
        "limit": arguments.limit,
        "new_tokens": arguments.generate,
        "prompts": Path(arguments.prompt_file) if arguments.prompt_file else None,
        "cache": None if arguments.no_cache else Path(arguments.cache) if arguments.cache else default_folder(),
    }


def _print_scores(arguments: argparse.Namespace, result: dict[str, Any], table: Any, render: Any) -> None:
    _print(arguments, result, table)
    kept = {kind: counts for kind, counts in (result["cache"] or {}).items() if kind != "folder" and counts["found"]}
    if kept:
        told = ", ".join(f"{counts['found']} of {counts['asked']} {kind}" for kind, counts in kept.items())
        sys.stderr.write(f"note: {told} were measured before; --no-cache measures them anew\n")
    if arguments.report:
        Path(arguments.report).write_text(render(result), encoding="utf-8")


def _generate(arguments: argparse.Namespace) -> int:
    from compress.models.store import device_named, local_folder
    from compress.runtime.generate import generate
    from compress.runtime.load import load

    model, tokenizer = load(local_folder(arguments.model), device=device_named(arguments.device))
    text = generate(model, tokenizer, arguments.prompt, max_new_tokens=arguments.max_new_tokens)
    if arguments.json:
        _print(arguments, {"prompt": arguments.prompt, "text": text}, [])
    else:
        sys.stdout.write(text + "\n")
    return 0


def _write(arguments: argparse.Namespace) -> int:
    from compress.progress import Bar
    from compress.runtime.own_text import write_text

    with Bar() as bar:
        found = write_text(
            arguments.model,
            arguments.output,
            tokens=arguments.tokens,
            length=arguments.length,
            seed=arguments.seed,
            device=arguments.device,
            overwrite=arguments.overwrite,
            progress=bar.show,
        )
    told = f"{found['documents']:,}, of {found['tokens']:,} tokens together"
    _print(arguments, found, [("output", found["output"]), ("documents", told)])
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from compress.bench import Work, bench
    from compress.progress import Bar
    from compress.tables import bench_table

    work = Work(arguments.prompt_tokens, arguments.tokens, arguments.batch, arguments.threads, arguments.repetitions)
    with Bar() as bar:
        result = bench(arguments.model, baseline=arguments.baseline, work=work, progress=bar.show)
    _print(arguments, result, bench_table(result))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from compress.demo import run_demo
    from compress.progress import Bar
    from compress.tables import demo_table

    with Bar() as bar:
        rows = run_demo(Path(arguments.folder), progress=bar.show)
    _print(arguments, {"folder": arguments.folder, "recipes": rows}, demo_table(rows))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from compress.doctor import diagnose
    from compress.tables import doctor_table

    found = diagnose()
    _print(arguments, found, doctor_table(found))
    return 0


def _print(arguments: argparse.Namespace, result: Any, lines: Any) -> None:
    """The result on stdout: JSON, or what a person reads (a rich renderable, or rows of two columns)."""
    if arguments.json:
        sys.stdout.write(json.dumps(result, default=str) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if isinstance(lines, list):
        table = Table.grid(padding=(0, 2))
        for row in lines:
            table.add_row(*map(Text, row))
        lines = table
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, 140)
    console.print(lines)


def _complain(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "recipes": _recipes,
    "inspect": _inspect,
    "convert": _convert,
    "eval": _eval,
    "compare": _compare,
    "generate": _generate,
    "write": _write,
    "bench": _bench,
    "demo": _demo,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
