"""What the command line takes: commands, their arguments, and an example of each."""

from __future__ import annotations

import argparse

EXAMPLES = {
    "run": "netsuke run w4a16-gptq --model ./Llama-3.2-1B --calibration text.jsonl --output out",
    "plan": "netsuke plan w4a16-gptq --model ./Llama-3.2-1B",
    "recipes": "netsuke recipes w4a16-gptq > mine.yaml",
    "inspect": "netsuke inspect out",
    "convert": "netsuke convert out --to gptq_v2 --output out-gptq",
    "eval": "netsuke eval out --baseline ./Llama-3.2-1B --text test.jsonl",
    "compare": "netsuke compare out-w4 out-w3 --baseline ./Llama-3.2-1B --text test.jsonl --report compared.html",
    "generate": 'netsuke generate out --prompt "Once upon a time"',
    "write": "netsuke write ./Llama-3.2-1B --output own.jsonl",
    "bench": "netsuke bench out --baseline ./Llama-3.2-1B",
    "demo": "netsuke demo",
    "doctor": "netsuke doctor",
}


def parser() -> argparse.ArgumentParser:
    """Its result names the command as `command`."""
    top = argparse.ArgumentParser(
        prog="netsuke", description="Carve large transformer models small and keep every detail."
    )
    commands = top.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}")

    run = add("run", "compress a model by a recipe")
    _recipe_arguments(run)
    run.add_argument("--output", metavar="DIR", help="where the checkpoint appears when it is whole")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    again.add_argument("--overwrite", action="store_true", help="replace what is at the output")
    run.add_argument("--dry-run", action="store_true", help="stop after the plan")
    _json_argument(run)

    plan = add("plan", "show what a run would do, from headers alone")
    _recipe_arguments(plan)
    _json_argument(plan)

    recipes = add("recipes", "list the shipped recipes, or print one")
    recipes.add_argument("name", nargs="?", metavar="NAME")
    _json_argument(recipes)

    inspect = add("inspect", "show what a checkpoint holds")
    inspect.add_argument("folder", metavar="DIR", help="or a GGUF file")
    _json_argument(inspect)

    convert = add("convert", "write the same quantized values in another runtime's format")
    convert.add_argument("folder", metavar="DIR")
    convert.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="gptq, awq, compressed-tensors, gguf-q4_k, gguf-q4_0, onnx, openvino …",
    )
    convert.add_argument("--output", required=True, metavar="DIR2")
    convert.add_argument(
        "--calibration", metavar="FILE_OR_NAME", help="text that weighs errors where GGUF has layers quantized anew"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace what is at the output")
    _json_argument(convert)

    evaluate = add("eval", "score a model, alone or against a baseline")
    evaluate.add_argument("model", metavar="MODEL")
    _score_arguments(evaluate)
    _json_argument(evaluate)

    compare = add("compare", "score several models, and show which are worth their size")
    compare.add_argument("models", nargs="+", metavar="MODEL")
    _score_arguments(compare)
    _json_argument(compare)

    generate = add("generate", "continue a text on netsuke's runtime")
    generate.add_argument("model", metavar="MODEL")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    _json_argument(generate)

    write = add("write", "let a model write a text to calibrate on, where there is none like those that it will read")
    write.add_argument("model", metavar="MODEL")
    write.add_argument("--output", required=True, metavar="FILE.jsonl")
    write.add_argument("--tokens", type=int, default=131_072, metavar="N", help="of all documents together")
    write.add_argument("--length", type=int, default=512, metavar="N", help="the most tokens of a document")
    write.add_argument("--seed", type=int, default=0, metavar="N")
    write.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    write.add_argument("--overwrite", action="store_true", help="replace what is at the output")
    _json_argument(write)

    bench = add("bench", "measure speed and memory, alone or against a baseline in the same run")
    bench.add_argument("model", metavar="MODEL")
    bench.add_argument("--baseline", metavar="MODEL", help="the original, to compare with")
    bench.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="tokens to read")
    bench.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to write after them")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time")
    bench.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: torch's own choice)")
    bench.add_argument("--repetitions", type=int, default=5, metavar="N", help="measurements that medians are taken of")
    _json_argument(bench)

    demo = add("demo", "train a small model, compress it four ways, show what it cost; no network needed")
    demo.add_argument("folder", nargs="?", default="netsuke-demo", metavar="DIR")
    _json_argument(demo)

    doctor = add("doctor", "versions, devices, and which backend each scheme runs on")
    _json_argument(doctor)
    return top


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    parser.add_argument("--model", metavar="MODEL", help="a Hugging Face folder or hub id")
    parser.add_argument("--calibration", metavar="FILE_OR_NAME", help="text in place of the recipe's dataset")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE",
        help="override one value of the recipe, gptq.group_size=64; repeatable",
    )  # fmt: skip


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", metavar="MODEL", help="the original, to compare with on the same tokens")
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILE", help=".jsonl, .txt or .parquet; repeatable"
    )
    parser.add_argument("--tasks", metavar="A,B", help="recall, copy; names or YAML files of lm-eval tasks")
    parser.add_argument("--context", type=int, metavar="N", help="tokens per window")
    parser.add_argument("--limit", type=int, metavar="N", help="most windows per text, most items per task")
    parser.add_argument("--generate", type=int, metavar="N", help="new tokens to write, and to compare")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="documents to write after (default: the beginnings of the texts' windows)"
    )
    parser.add_argument("--report", metavar="FILE.html", help="write the scores as a page")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--cache", metavar="DIR", help="where measurements are kept (default: ~/.cache/netsuke/scores)")
    kept.add_argument("--no-cache", action="store_true", help="measure everything anew, and keep nothing")


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object")
