"""What an installed netsuke holds and needs, read from pyproject.toml without building anything."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WHEEL = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]

DISTRIBUTION_OF = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python"}
"""Modules whose distribution is called something else."""


def test_the_wheel_holds_every_package_of_the_checkout() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(WHEEL["packages"]) == packages


def test_the_recipes_travel_inside_compress() -> None:
    assert WHEEL["force-include"] == {"recipes": "compress/_recipes"}


def test_the_command_is_netsuke_and_leaves_eval_and_compress_to_their_owners() -> None:
    assert PROJECT["scripts"] == {"netsuke": "compress.cli:main"}


def test_the_version_is_the_newest_one_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", changelog, re.MULTILINE)
    assert versions
    assert PROJECT["version"] == versions[0]


def test_every_third_party_import_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(each for extra in extras.values() for each in extra)]
    declared = {normalized(re.split(r"[^\w.-]", each)[0]) for each in requirements}
    imported = {
        normalized(DISTRIBUTION_OF.get(module, module)): str(path.relative_to(ROOT))
        for package in WHEEL["packages"]
        for path in (ROOT / package).rglob("*.py")
        for module in modules_imported_by(path) - sys.stdlib_module_names - set(WHEEL["packages"])
    }
    undeclared = {name: where for name, where in imported.items() if name not in declared}
    assert not undeclared, f"imported and not in pyproject.toml: {undeclared}"


def modules_imported_by(path: Path) -> set[str]:
    """The top-level names of everything a file imports, at any depth."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


def normalized(name: str) -> str:
    return name.lower().replace("_", "-")
