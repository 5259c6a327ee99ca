"""The architecture as a test: who may import whom, what stays light, and what no file is called.

Lower never imports higher, siblings never import each other, and the two leaves know nothing of `compress`.
Imports are read from the source, never executed, so an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "eval", "quant_kernels")

# Lowest first. The parts of one row are siblings; `""` is the public API, compress/__init__.py.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("models",),
    ("calibrate",),
    ("stage",),
    ("transform", "quantize", "prune", "distill", "checkpoint", "runtime"),
    ("recipe",),
    ("plan",),
    ("bench", "inspection", "progress"),
    ("scoring",),
    ("tables",),
    ("report",),
    ("pipeline",),
    ("",),
    ("arguments", "demo", "doctor"),
    ("cli",),
)
EVERYWHERE = "errors"
PART_OF_FILE = {"draft": "recipe"}
"""Files that belong to a part by another name."""
SIBLINGS_ALLOWED = {("runtime", "checkpoint"): "loading a checkpoint needs the codecs that wrote it"}
KERNEL_USERS = ("checkpoint", "runtime", "doctor")
EVAL_USERS = ("calibrate", "scoring", "pipeline", "cli")
LEAF_IMPORTS = {
    "eval": {"cyllama", "jaxtyping", "jinja2", "llama_cpp", "lm_eval", "pyarrow", "torch", "tqdm", "transformers"},
    "quant_kernels": {"jaxtyping", "torch", "triton"},
}
SHAPELESS_NAMES = ("base", "common", "helpers", "misc", "utils")
MAX_LINES = 400

STANDARD_LIBRARY = sys.stdlib_module_names
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


@dataclass(frozen=True)
class Import:
    """One name that one module imports; a `from a import b` imports `a.b`."""

    importer: str
    imported: str
    lazy: bool = False
    """Inside a function or under TYPE_CHECKING: nothing happens when the importer itself is imported."""
    plain: bool = False
    """Written `import a.b`, which binds the name `a`."""
    where: str = ""


def part_of(module: str) -> str:
    """The part of `compress` that a module belongs to; a name that is no part is one of the public API."""
    name = module.removeprefix("compress").removeprefix(".").split(".")[0]
    part = PART_OF_FILE.get(name, name)
    return part if part in RANK or part == EVERYWHERE else ""


def broken_rule(found: Import) -> str | None:
    """The rule this import breaks, None where it breaks none."""
    importer, imported = found.importer.split(".")[0], found.imported.split(".")[0]
    if importer in LEAF_IMPORTS:
        allowed = {importer, *LEAF_IMPORTS[importer], *STANDARD_LIBRARY}
        return None if imported in allowed else f"{importer} is a leaf and never imports {imported}"
    upper, lower = part_of(found.importer), part_of(found.imported)
    if imported == "quant_kernels" and upper not in KERNEL_USERS:
        return f"only {', '.join(KERNEL_USERS)} run on quant_kernels"
    if imported == "eval":
        if upper not in EVAL_USERS:
            return f"only {', '.join(EVAL_USERS)} read or score text with eval"
        if not found.lazy:
            return "eval is imported inside functions, where a user's own eval.py can be named in the error"
        return "write `from eval.x import y`: `eval` is a builtin" if found.plain else None
    if imported != "compress" or upper == lower or lower == EVERYWHERE:
        return None
    if upper == EVERYWHERE:
        return "errors imports nothing of compress"
    if RANK[lower] < RANK[upper] or (upper, lower) in SIBLINGS_ALLOWED:
        return None
    if RANK[lower] == RANK[upper]:
        return f"{upper} and {lower} are siblings: what they share moves down"
    return f"{upper} is below {lower or 'the public API'}"


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in one file, at any depth."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            where = f"{path.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module_of(path), alias.name, lazy, plain=True, where=where)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    name = "." * child.level + f"{child.module}.{alias.name}"
                    yield Import(module_of(path), name, lazy, where=where)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from visit(child, lazy or is_function or is_for_types)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), lazy=False)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    """Of all files."""
    return [each for path in sources() for each in imports_of(path)]


def test_every_import_follows_the_arrows(imports: list[Import]) -> None:
    broken = [f"{each.where}: imports {each.imported}: {rule}" for each in imports if (rule := broken_rule(each))]
    assert not broken, "\n" + "\n".join(broken)


def test_every_import_is_absolute(imports: list[Import]) -> None:
    relative = [each.where for each in imports if each.imported.startswith(".")]
    assert not relative, f"write the full module name, so that the arrows can be read: {relative}"


def test_kept_scores_know_everything_between_a_folder_and_its_logits(imports: list[Import]) -> None:
    """What `compress.scoring.opened` imports, at any distance, is in the hash that `compress.scoring.cache` takes."""
    from compress.scoring.cache import PROGRAM

    needs: dict[str, set[str]] = {}
    for each in imports:
        needs.setdefault(each.importer, set()).update((each.imported, each.imported.rpartition(".")[0]))
    reached, new = set(), {"compress.scoring.opened"}
    while new:
        reached |= new
        new = {name for module in new for name in needs.get(module, ()) if name in needs} - reached
    hashed = tuple(part.removesuffix(".py").replace("/", ".") for part in PROGRAM)
    assert len(reached) > 20
    assert not [module for module in reached if not f"{module}.".startswith(tuple(f"{part}." for part in hashed))]


def test_every_part_of_compress_has_a_layer() -> None:
    parts = {path.stem for path in (ROOT / "compress").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    unknown = parts - RANK.keys() - PART_OF_FILE.keys() - {"__init__", EVERYWHERE}
    assert not unknown, f"give {sorted(unknown)} a place in LAYERS"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("compress.core.affine", "compress.models.store"),
        ("compress.core.affine", "compress.run"),
        ("compress.errors", "compress.core.scheme"),
        ("compress.prune.wanda", "compress.quantize.gptq"),
        ("compress.checkpoint.formats", "compress.runtime.load"),
        ("compress.pipeline", "compress.cli"),
        ("compress.quantize.rtn", "quant_kernels.matmul"),
        ("compress.recipe", "eval.perplexity"),
        ("eval.perplexity", "compress.errors"),
        ("quant_kernels.matmul", "eval.perplexity"),
        ("quant_kernels.matmul", "transformers"),
    ],
)
def test_an_import_against_the_arrows_is_found(importer: str, imported: str) -> None:
    assert broken_rule(Import(importer, imported, lazy=True))


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("compress.core.affine", "compress.core.scheme"),
        ("compress.core.affine", "compress.errors.RequestError"),
        ("compress.runtime.load", "compress.checkpoint.formats"),
        ("compress.runtime.modules", "quant_kernels.matmul"),
        ("compress.cli", "compress.pipeline"),
        ("compress.pipeline", "eval.perplexity"),
        ("eval.perplexity", "torch"),
        ("quant_kernels.matmul", "triton.language"),
    ],
)
def test_an_import_along_the_arrows_is_not_found(importer: str, imported: str) -> None:
    assert broken_rule(Import(importer, imported, lazy=True)) is None


@pytest.mark.parametrize(
    "found",
    [
        Import("compress.pipeline", "eval.perplexity", lazy=False),
        Import("compress.pipeline", "eval.perplexity", lazy=True, plain=True),
    ],
)
def test_eval_imported_early_or_by_its_bare_name_is_found(found: Import) -> None:
    assert broken_rule(found)


def heavy_modules_after(statement: str) -> str:
    """Which of the slow libraries a fresh Python holds after the statement, as its last line of output."""
    code = f"import sys\n{statement}\nprint(sorted(sys.modules.keys() & {{'torch', 'transformers'}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_importing_compress_does_not_import_torch() -> None:
    assert heavy_modules_after("import compress") == "[]"


def test_asking_for_help_does_not_import_torch() -> None:
    ask = """
import contextlib
from compress.cli import main
sys.argv = ["netsuke", "--help"]
with contextlib.suppress(SystemExit):
    main()
"""
    assert heavy_modules_after(ask) == "[]"


def test_no_module_takes_the_name_of_one_in_the_standard_library() -> None:
    taken = [str(path.relative_to(ROOT)) for path in sources() if {path.stem, path.parent.name} & STANDARD_LIBRARY]
    assert not taken, f"a reader would look for these in the standard library: {taken}"


def test_every_file_name_says_what_is_in_it() -> None:
    shapeless = [
        str(path.relative_to(ROOT)) for path in sources() if {path.stem, path.parent.name} & set(SHAPELESS_NAMES)
    ]
    assert not shapeless, f"name these after what they hold: {shapeless}"


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in sources()}
    too_long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not too_long, f"split at the seam between two ideas: {too_long}"


def test_there_is_no_package_under_tests() -> None:
    """A tests/eval/__init__.py would be imported in the place of `eval`."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
