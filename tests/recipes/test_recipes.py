"""Every YAML under recipes/ is one that netsuke accepts, describes and ships, explicit in what matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compress.recipe import describe, dump, load, parse, shipped

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


def test_every_recipe_is_shipped_under_its_own_name() -> None:
    assert list(shipped().values()) == RECIPES
    assert list(shipped()) == NAMES


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
class TestEveryRecipe:
    def test_reads_the_same_by_name_and_by_file(self, path: Path) -> None:
        assert load(path.stem) == load(path)

    def test_reads_back_equal_when_resolved(self, path: Path) -> None:
        recipe = load(path)
        assert parse(dump(recipe), "resolved.yaml") == recipe

    def test_opens_with_one_line_that_says_what_it_is(self, path: Path) -> None:
        assert describe(path).endswith(".")

    def test_says_how_it_calibrates_stores_and_judges(self, path: Path) -> None:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"calibration", "stages", "checkpoint", "gates"} <= tree.keys()
        assert tree["calibration"].keys() >= {"dataset", "samples", "sequence_length", "seed"}

    def test_has_a_row_in_the_table_of_the_readme(self, path: Path) -> None:
        assert f"| `{path.stem}` |" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "smoke"])
def test_a_recipe_that_is_meant_for_use_has_a_gate_on_perplexity(name: str) -> None:
    assert load(name).gates.max_perplexity_ratio is not None


@pytest.mark.parametrize("name", [name for name in NAMES if not load(name).segments])
def test_a_recipe_is_named_after_its_scheme(name: str) -> None:
    stages = load(name).stages
    schemes = {stage.scheme for stage in stages if stage.role in {"quantizer", "cache"}}
    (scheme,) = schemes or {stage.resolved.name.replace(":", "of") for stage in stages if stage.role == "pruner"}
    named = "mixed" if load(name).allocator else scheme
    assert name == "smoke" or {named, named.removesuffix("a16")} & set(name.split("-"))
