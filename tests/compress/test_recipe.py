"""What a recipe may say, and the exact sentence and place of everything it may not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from compress.errors import RecipeError
from compress.recipe import Calibration, Gates, Recipe, describe, dump, load, overridden, parse, shipped

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Round:
    """A quantizer with every kind of field that a stage has."""

    name: ClassVar[str] = "round"
    scheme: str
    group_size: int | None = 128
    symmetric: bool = True
    range: Literal["minmax", "mse"] = "mse"
    order: Literal["none", "static"] | bool = True
    damping: float = 0.01
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} is not positive. Use 128, or null for one per row")


@dataclass(frozen=True)
class Smooth:
    """A transform that needs nothing said."""

    name: ClassVar[str] = "smooth"
    steps: int = 20


TABLE = {"round": Round, "smooth": Smooth}

GOOD = """\
# A recipe for tests.
calibration: {dataset: text.jsonl, samples: 4, sequence_length: 16}
stages:
  - smooth
  - round: {scheme: w4a16, ignore: [lm_head]}
gates: {max_perplexity_ratio: 1.05}
"""


def read(text: str, *overrides: str) -> Recipe:
    return parse(text, "x.yaml", overrides, TABLE)


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return caught.value.problems


def stage(fields: str) -> str:
    return f"stages:\n  - round: {{scheme: w4a16, {fields}}}\n"


class TestReading:
    def test_a_recipe_becomes_dataclasses_with_defaults_filled_in(self) -> None:
        assert read(GOOD) == Recipe(
            name="x",
            stages=(Smooth(), Round("w4a16", ignore=("lm_head",))),
            calibration=Calibration("text.jsonl", samples=4, sequence_length=16, seed=0),
            gates=Gates(max_perplexity_ratio=1.05),
        )

    def test_the_name_is_the_file_name_unless_the_recipe_gives_one(self) -> None:
        assert read(GOOD).name == "x"
        assert read(f"name: mine\n{GOOD}").name == "mine"

    @pytest.mark.parametrize("spelling", ["smooth", "smooth:", "smooth: {}"])
    def test_a_stage_without_fields_may_be_written_in_three_ways(self, spelling: str) -> None:
        assert read(f"stages:\n  - {spelling}\n").stages == (Smooth(),)

    def test_a_section_left_empty_is_all_defaults(self) -> None:
        assert read(f"{GOOD}evaluation:\n") == read(GOOD)

    def test_an_anchor_is_repeated_where_its_alias_stands(self) -> None:
        text = "stages:\n  - round: &same {scheme: w4a16}\n  - round: *same\n"
        assert read(text).stages == (Round("w4a16"), Round("w4a16"))

    @pytest.mark.parametrize("number", ["1e-2", "1.0e-2", "0.01", "+1E-2"])
    def test_a_number_may_be_written_with_an_exponent(self, number: str) -> None:
        assert read(stage(f"damping: {number}")).stages[0].damping == 0.01

    def test_a_whole_number_serves_as_a_number(self) -> None:
        assert read(stage("damping: 1")).stages[0].damping == 1

    def test_a_field_of_two_kinds_takes_both(self) -> None:
        assert read(stage("order: static")).stages[0].order == "static"
        assert read(stage("order: false")).stages[0].order is False


class TestComplaints:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (stage("dampning: 1"), "2:28: stages[0].round has no field 'dampning'. Did you mean 'damping'?"),
            (
                "stages: [smooth: {zebra: 1}]",
                "1:19: stages[0].smooth has no field 'zebra'. It has: steps.",
            ),
            (
                "stages: [smooth]\ncalibratoin: {}",
                "2:1: the recipe has no field 'calibratoin'. Did you mean 'calibration'?",
            ),
            (
                "stages: [smooth]\npositions: {}",
                "2:1: the recipe has no field 'positions'. It has: name, stages, calibration, evaluation, "
                "checkpoint, gates, target, model, output.",
            ),
            (
                "stages:\n  - smoth\n",
                "2:5: stages[0] is 'smoth', which is no stage. Did you mean 'smooth'? There are: round, smooth.",
            ),
            (
                "stages:\n  - zebra: {}\n",
                "2:5: stages[0] is 'zebra', which is no stage. There are: round, smooth.",
            ),
            (
                "stages:\n  - round:\n    scheme: w4a16\n",
                "3:5: stages[0] is round, scheme; a stage is one name with its fields under it: "
                "`- gptq: {scheme: w4a16}`.",
            ),
            (
                "stages: [3]",
                "1:10: stages[0] is 3; a stage is one name with its fields under it: `- gptq: {scheme: w4a16}`.",
            ),
            (
                "stages: [{}]",
                "1:10: stages[0] is empty; a stage is one name with its fields under it: `- gptq: {scheme: w4a16}`.",
            ),
            ("stages: [round]", "1:10: stages[0].round needs 'scheme'."),
            ("", "1:1: a recipe needs at least one stage."),
            ("gates: {}\nstages: []", "2:1: a recipe needs at least one stage."),
            ("stages: smooth", "1:1: stages must be a list, not 'smooth'. Write [smooth]."),
            ("[smooth]", "1:1: the recipe must be a mapping, not a list."),
            ("stages: [smooth]\ngates: 1.05", "2:1: gates must be a mapping, not 1.05."),
            ("stages: [smooth: 3]", "1:10: stages[0].smooth must be a mapping, not 3."),
        ],
    )
    def test_what_is_wrong_with_the_shape_is_said_at_its_key(self, text: str, complaint: str) -> None:
        assert problems(text) == (f"x.yaml:{complaint}",)

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ("group_size: a", "group_size must be a whole number or null, not 'a'."),
            ("group_size: true", "group_size must be a whole number or null, not true."),
            ("group_size: 1.5", "group_size must be a whole number or null, not 1.5."),
            ("symmetric: 1", "symmetric must be true or false, not 1."),
            ("symmetric:", "symmetric must be true or false, not null."),
            ("range: mze", "range must be 'minmax' or 'mse', not 'mze'. Did you mean 'mse'?"),
            ("order: best", "order must be 'none', 'static', true or false, not 'best'."),
            ("damping: '1'", "damping must be a number, not '1'."),
            ("damping: .nan", "damping must be a number, not nan."),
            ("damping: .inf", "damping must be a number, not inf."),
            ("damping: [1]", "damping must be a number, not a list."),
            ("ignore: lm_head", "ignore must be a list, not 'lm_head'. Write [lm_head]."),
            ("ignore: {a: b}", "ignore must be a list, not a mapping."),
        ],
    )
    def test_a_wrong_value_is_shown_with_what_is_allowed(self, fields: str, complaint: str) -> None:
        assert problems(stage(fields)) == (f"x.yaml:2:28: stages[0].round.{complaint}",)

    def test_a_wrong_item_of_a_list_is_said_at_the_item(self) -> None:
        assert problems(stage("ignore: [lm_head, 5]")) == (
            "x.yaml:2:46: stages[0].round.ignore[1] must be text, not 5.",
        )

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ("samples: 0", "samples must be a whole number of at least 1, not 0."),
            ("sequence_length: 7", "sequence_length must be a whole number of at least 8, not 7."),
            ("seed: -1", "seed must be a whole number of at least 0, not -1."),
            ("dtype: float16", "dtype must be 'auto', 'float32' or 'bfloat16', not 'float16'. Did you mean"),
        ],
    )
    def test_calibration_is_held_to_its_bounds(self, fields: str, complaint: str) -> None:
        [problem] = problems(f"stages: [smooth]\ncalibration: {{{fields}}}")
        assert problem.startswith(f"x.yaml:2:15: calibration.{complaint}")

    def test_a_gate_must_be_above_zero(self) -> None:
        assert problems("stages: [smooth]\ngates: {max_kl_divergence: 0}") == (
            "x.yaml:2:9: gates.max_kl_divergence must be a number above 0 or null, not 0.",
        )

    def test_what_a_stage_says_of_its_own_values_stands_at_the_field_it_names(self) -> None:
        assert problems(stage("damping: 1, group_size: -5")) == (
            "x.yaml:2:40: stages[0].round: group_size=-5 is not positive. Use 128, or null for one per row.",
        )

    def test_a_key_given_twice_is_refused(self) -> None:
        assert problems("stages: [smooth]\ngates:\n  max_kl_divergence: 1\n  max_kl_divergence: 2") == (
            "x.yaml:4:3: gates.max_kl_divergence is given twice, first at x.yaml:3:3.",
        )

    def test_all_problems_are_reported_at_once_those_of_the_text_first(self) -> None:
        text = """\
calibration: {samples: none, seed: 1, seed: 2}
stages:
  - round: {schem: w4a16}
  - smoothe
  - round: {scheme: w4a16, group_size: 0}
gate: {}
"""
        assert [problem.split(" ")[0] for problem in problems(text)] == [
            "x.yaml:1:39:",
            "x.yaml:1:15:",
            "x.yaml:3:13:",
            "x.yaml:4:5:",
            "x.yaml:5:28:",
            "x.yaml:6:1:",
        ]


class TestBrokenYaml:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("stages: [smooth", "1:16: this is not YAML: expected ',' or ']', but got '<stream end>'."),
            ("a: 1\n\tb: 2", "2:1: this is not YAML: found character '\\t' that cannot start any token."),
            ("stages: *gone", "1:9: this is not YAML: found undefined alias 'gone'."),
            ("a: 1\n---\nb: 2", "2:1: this is not YAML: but found another document."),
            (
                "a: \a",
                "1:1: this is not YAML: unacceptable character #x0007: special characters are not allowed.",
            ),
            (
                "name: !python/name:os.system",
                "1:7: this is not YAML: could not determine a constructor for the tag '!python/name:os.system'.",
            ),
        ],
    )
    def test_text_that_is_not_yaml_is_refused_with_its_place(self, text: str, complaint: str) -> None:
        assert problems(text) == (f"x.yaml:{complaint}",)

    def test_an_alias_inside_its_own_anchor_is_refused(self) -> None:
        [problem] = problems("stages: &loop [*loop]")
        assert "this is not YAML" in problem


class TestOverrides:
    @pytest.mark.parametrize("path", ["stages[1].round.damping", "stages.1.round.damping", "round.damping"])
    def test_a_field_of_a_stage_is_set_by_index_or_by_the_name_of_the_stage(self, path: str) -> None:
        assert read(GOOD, f"{path}=0.5").stages[1].damping == 0.5

    def test_the_value_is_read_as_yaml(self) -> None:
        recipe = read(GOOD, "round.group_size=null", "round.ignore=[a, 're:b.*']", "model=./a=b")
        assert recipe.stages[1].group_size is None
        assert recipe.stages[1].ignore == ("a", "re:b.*")
        assert recipe.model == "./a=b"

    def test_a_section_that_is_absent_is_made(self) -> None:
        assert read("stages: [smooth]", "gates.max_bytes_ratio=0.5").gates == Gates(max_bytes_ratio=0.5)

    def test_a_bare_stage_takes_fields(self) -> None:
        assert read(GOOD, "smooth.steps=3").stages[0] == Smooth(3)

    def test_an_item_of_a_list_and_a_whole_stage_can_be_replaced(self) -> None:
        recipe = read(GOOD, "round.ignore[0]=head", "stages[0]=round: {scheme: w8a16}")
        assert recipe.stages == (Round("w8a16"), Round("w4a16", ignore=("head",)))

    def test_the_last_of_two_overrides_holds(self) -> None:
        assert read(GOOD, "calibration.seed=1", "calibration.seed=2").calibration.seed == 2

    def test_a_recipe_made_in_code_takes_overrides(self) -> None:
        made = Recipe("mine", (Smooth(2), Round("w4a16")))
        assert overridden(made, ()) is made
        changed = overridden(made, ["round.group_size=64", "calibration.seed=3"])
        assert changed == dataclasses.replace(
            made, stages=(Smooth(2), Round("w4a16", group_size=64)), calibration=Calibration(seed=3)
        )
        with pytest.raises(RecipeError, match=r"--set round.size: stages\[1\].round has no field 'size'"):
            overridden(made, ["round.size=64"])

    def test_an_override_mends_a_wrong_value_of_the_file(self) -> None:
        assert read(stage("group_size: x"), "round.group_size=64").stages[0].group_size == 64

    @pytest.mark.parametrize(
        ("override", "complaint"),
        [
            ("seed", "--set seed: write path=value, like calibration.samples=64."),
            ("=1", "--set =1: write path=value, like calibration.samples=64."),
            ("a..b=1", "--set a..b=1: write path=value, like calibration.samples=64."),
            (
                "calibration.samples=0",
                "--set calibration.samples: calibration.samples must be a whole number of at least 1, not 0.",
            ),
            (
                "calibration.sample=1",
                "--set calibration.sample: calibration has no field 'sample'. Did you mean 'samples'?",
            ),
            (
                "calibratoin.samples=1",
                "--set calibratoin.samples: the recipe has no field and no stage 'calibratoin'. "
                "Did you mean 'calibration'?",
            ),
            (
                "rond.damping=1",
                "--set rond.damping: the recipe has no field and no stage 'rond'. Did you mean 'round'?",
            ),
            (
                "stages[2].round.damping=1",
                "--set stages[2].round.damping: stages is a list, [2] is not in it.",
            ),
            ("stages.round=1", "--set stages.round: stages is a list, round is not in it."),
            (
                "calibration.samples.x=1",
                "--set calibration.samples.x: calibration.samples is 4, x is not in it.",
            ),
            (
                "stages[0].round.damping=1",
                "--set stages[0].round.damping: stages[0] is smooth, round; a stage is one name with its "
                "fields under it: `- gptq: {scheme: w4a16}`.",
            ),
            (
                "round.group_size=-5",
                "--set round.group_size: stages[1].round: group_size=-5 is not positive. "
                "Use 128, or null for one per row.",
            ),
            (
                "round.ignore=[a",
                "--set round.ignore: this is not YAML: expected ',' or ']', but got '<stream end>'.",
            ),
            ("round.ignore=[a, 5]", "--set round.ignore: stages[1].round.ignore[1] must be text, not 5."),
        ],
    )
    def test_a_wrong_override_is_located_at_itself(self, override: str, complaint: str) -> None:
        assert problems(GOOD, override) == (complaint,)

    def test_a_stage_name_that_stands_twice_must_be_given_by_index(self) -> None:
        assert problems("stages: [smooth, smooth]", "smooth.steps=1") == (
            "--set smooth.steps: which of the stages? Write stages[0].smooth or stages[1].smooth.",
        )

    def test_overrides_and_file_are_judged_together(self) -> None:
        assert problems("stages: []", "gates.x=1") == (
            "x.yaml:1:1: a recipe needs at least one stage.",
            "--set gates.x: gates has no field 'x'. It has: max_perplexity_ratio, max_kl_divergence, max_bytes_ratio.",
        )

    @pytest.mark.parametrize("text", ["", "[smooth]", "stages: 5", "stages: [5]"])
    def test_an_override_of_a_misshapen_recipe_is_still_only_a_complaint(self, text: str) -> None:
        assert problems(text, "round.damping=1", "stages[0].round=1", "gates.max_bytes_ratio=1")


class TestWhere:
    @pytest.mark.parametrize(
        ("path", "place"),
        [
            (("stages", 1, "round", "ignore", 0), "x.yaml:5:37"),
            (("stages", 1, "round", "ignore"), "x.yaml:5:28"),
            (("stages", 1, "round", "group_size"), "x.yaml:5:5"),
            (("stages", 0, "smooth", "steps"), "x.yaml:4:5"),
            (("checkpoint", "format"), "x.yaml:1:1"),
        ],
    )
    def test_it_is_the_place_of_the_nearest_part_that_was_written(
        self, path: tuple[str | int, ...], place: str
    ) -> None:
        assert read(GOOD).where(*path) == place

    def test_what_an_override_wrote_is_where_the_override_is(self) -> None:
        recipe = read(GOOD, "round.ignore=[a, b]")
        assert recipe.where("stages", 1, "round", "ignore", 1) == "--set round.ignore"

    def test_a_recipe_made_in_python_is_known_by_its_name(self) -> None:
        assert Recipe("mine", (Smooth(),)).where("stages", 0) == "mine"


class TestDumping:
    def test_what_is_dumped_reads_back_equal(self) -> None:
        recipe = read(GOOD, "model=café", "output=1e5x", "round.damping=1e-7")
        assert read(dump(recipe)) == recipe

    @pytest.mark.parametrize("name", ["1e5", "null", "5", "yes", "a: b", "# a", "2024-01-01", ""])
    def test_text_that_looks_like_something_else_stays_text(self, name: str) -> None:
        recipe = Recipe(name, (Smooth(),))
        assert read(dump(recipe)) == recipe

    def test_a_dump_leaves_nothing_to_a_default(self) -> None:
        def mentioned(instance: object, text: str) -> set[str]:
            return {each.name for each in dataclasses.fields(instance) if f"{each.name}:" in text}  # type: ignore[arg-type]

        recipe = read(GOOD)
        text = dump(recipe)
        for part in (recipe.calibration, recipe.evaluation, recipe.checkpoint, recipe.gates, *recipe.stages):
            assert mentioned(part, text) == {each.name for each in dataclasses.fields(part)}


class TestFinding:
    def test_a_name_that_is_nothing_is_refused_with_the_shipped_ones(self) -> None:
        with pytest.raises(RecipeError) as caught:
            load("w4a16-gtpq")
        names = ", ".join(shipped())
        assert caught.value.problems == (
            f"w4a16-gtpq: neither a file nor a shipped recipe. Did you mean 'w4a16-gptq'? Shipped: {names}.",
        )

    def test_a_file_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RecipeError, match=r"x\.yaml: cannot be read: 'utf-8' codec"):
            load(path)

    def test_the_description_is_the_opening_comment(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(GOOD, encoding="utf-8")
        assert describe(path) == "A recipe for tests."

    @pytest.mark.parametrize("text", ["", "stages: [smooth]\n# late\n"])
    def test_a_recipe_that_opens_with_no_comment_has_no_description(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        assert describe(path) == ""

    def test_recipes_are_listed_without_torch(self) -> None:
        code = "import sys; from compress.recipe import shipped; shipped(); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
