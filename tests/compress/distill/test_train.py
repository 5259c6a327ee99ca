"""Training: a student comes closer to its teacher, the same way however it is cut up, interrupted or shared out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compress.distill.objective import Objective
from compress.distill.sampling import continued, empty_cache
from compress.distill.schedule import batch_of, chance, cut_of
from compress.distill.train import Trained, Training, train
from compress.errors import ModelError, NumericalError, OutputError, RequestError

VOCABULARY, LENGTH, BATCH = 48, 16, 4
TRAINING = Training(
    tokens=10 * BATCH * LENGTH, batch_size=BATCH, learning_rate=5e-3, evaluate_every=5, precision="float32"
)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["accelerate", "compress.distill.train", "transformers.models.gpt2.modeling_gpt2",
     "transformers.models.llama.modeling_llama"]
)  # fmt: skip
IN_A_PROCESS = """
import json, os
from pathlib import Path
import torch
from compress.distill.objective import Objective
from compress.distill.train import Training, train

os.environ |= world
for training, objective, student, teacher, work in runs:
    options = Training(**training), Objective(**objective)
    told = []
    given = *torch.load(models / "windows.pt"), *options, work, lambda *words: told.append(words)
    trained = train(models / student, models / teacher, *given)
    work.with_name(work.name + world["RANK"] + ".json").write_text(json.dumps([trained.curve, len(told)]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of two blocks; a student, its copy with noise in the matrices; one narrow block; all with tied heads.
    And the same in GPT-2, with dropout, and values in one matrix with queries and keys."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    shared = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    llama = LlamaConfig(num_hidden_layers=2, **sizes, **shared)
    narrow = LlamaConfig(num_hidden_layers=1, **{name: size // 2 for name, size in sizes.items()}, **shared)
    LlamaForCausalLM(narrow).save_pretrained(folder / "narrow")
    gpt2 = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=LENGTH, **shared)
    for name, model in (("", LlamaForCausalLM(llama)), ("gpt2-", GPT2LMHeadModel(gpt2))):
        model.save_pretrained(folder / f"{name}teacher")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data += 0.2 * parameter.std() * torch.randn_like(parameter)
        model.save_pretrained(folder / f"{name}student")
    torch.save((windows(24), windows(5, seed=1)), folder / "windows.pt")
    return folder


def windows(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def run(
    models: Path,
    work: Path,
    training: Training = TRAINING,
    objective: Objective = Objective(),  # noqa: B008
    *,
    student: str = "student",
    teacher: str | None = "teacher",
    count: int = 24,
    **how: Any,
) -> Trained:
    folders = models / student, None if teacher is None else models / teacher
    return train(*folders, windows(count), windows(5, seed=1), training, objective, work, how.pop("tell", quiet), **how)


def quiet(phase: str, share: float, words: str) -> None:
    pass


def opened(models: Path, name: str, state: dict[str, Tensor] | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(models / name)
    missing = model.load_state_dict(state, strict=False).missing_keys if state else []
    assert set(missing) <= {"lm_head.weight"}, "tied ones are given once"
    return model


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module, tokens: Tensor, first: int = 0) -> float:
    """Mean forward KL of what follows the tokens from `first` to the last but one."""
    p, q = (model(input_ids=tokens).logits[:, first:-1].double().log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def column(curve: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([point[name] for point in curve if point[name] is not None])


def test_healing_halves_what_a_student_is_away_from_its_teacher(models: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float, str]] = []
    training = replace(TRAINING, tokens=60 * 8 * LENGTH, batch_size=8)
    trained = run(models, tmp_path / "work", training, count=200, tell=lambda *each: told.append(each))
    held_out = column(trained.curve, "held_out")
    teacher, apart = opened(models, "teacher"), windows(5, seed=1)
    assert held_out[0].item() == pytest.approx(divergence(opened(models, "student"), teacher, apart), rel=1e-5)
    assert held_out[-1] < held_out[0] / 2
    assert divergence(opened(models, "student", trained.state), teacher, apart) == pytest.approx(
        float(held_out.min()), rel=1e-5
    )
    loss = column(trained.curve, "loss")
    assert loss[-5:].mean() < loss[:5].mean()
    assert (trained.steps, trained.tokens, trained.stopped_early) == (60, training.tokens, False)
    assert [(phase, share) for phase, share, _ in told] == [("distill", (step + 1) / 60) for step in range(60)]
    again = run(models, tmp_path / "work", training, count=200, tell=lambda *_: pytest.fail("it is finished"))
    assert again.curve == trained.curve
    assert_close(again.state, trained.state, rtol=0, atol=0)
    with pytest.raises(OutputError, match="holds a training of other options, windows or models"):
        run(models, tmp_path / "work", training, count=199)


def test_tied_embeddings_are_trained_and_stay_tied(models: Path, tmp_path: Path) -> None:
    state = run(models, tmp_path / "work").state
    before = opened(models, "student")
    assert state.keys() == {name for name, _ in before.named_parameters()}
    assert "lm_head.weight" not in state
    assert not torch.equal(state["model.embed_tokens.weight"], before.lm_head.weight)


def test_a_batch_in_parts_is_the_whole_batch(models: Path, tmp_path: Path) -> None:
    objective = Objective(cross_entropy=0.5, hidden=0.3, relations=0.2, relation_heads=2)
    whole = run(models, tmp_path / "whole", objective=objective)
    parts = run(models, tmp_path / "parts", replace(TRAINING, micro_batch=3, gradient_checkpointing=True), objective)
    assert_close(column(parts.curve, "loss"), column(whole.curve, "loss"), rtol=ROUNDING, atol=0)
    assert_close(column(parts.curve, "held_out"), column(whole.curve, "held_out"), rtol=ROUNDING, atol=0)


ROUNDING = 10 * BATCH * LENGTH * 2**-24
"""What summing the losses of a batch in another order can change, relative, and again in each of ten steps."""


def start(models: Path, runs: list[Any], world: dict[str, str]) -> Any:
    """Train in a process of its own, which has imported everything and done nothing."""
    process = PROCESSES.Process(target=exec, args=(IN_A_PROCESS, {"models": models, "runs": runs, "world": world}))
    process.start()
    return process


def test_two_processes_follow_the_curve_of_one(models: Path, tmp_path: Path) -> None:
    options = [
        (replace(TRAINING, clip=2.0, micro_batch=1), Objective(hidden=0.5, cross_entropy=0.2)),
        (replace(TRAINING, clip=2.0, teacher_top_k=8), Objective()),
    ]
    runs = [
        (asdict(training), asdict(objective), "student", "teacher", tmp_path / f"two-{index}")
        for index, (training, objective) in enumerate(options)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(models, runs, world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    alone = [run(models, tmp_path / f"one-{index}", *each).curve for index, each in enumerate(options)]
    for process in processes:
        process.join()
    for index, curve in enumerate(alone):
        (first, told), (second, nothing) = (
            json.loads((tmp_path / f"two-{index}{rank}.json").read_text()) for rank in "01"
        )
        assert first == second
        assert told >= len(curve) - 1
        assert nothing == 0, "the main process alone tells"
        for name in ("loss", "held_out"):
            assert_close(column(first, name), column(curve, name), rtol=ROUNDING, atol=0)


def test_a_killed_training_goes_on_to_the_same_weights_bit_for_bit(models: Path, tmp_path: Path) -> None:
    """With dropout, and text that the student writes: both take chances."""
    names = {"student": "gpt2-student", "teacher": "gpt2-teacher"}
    training = replace(TRAINING, tokens=20 * BATCH * LENGTH, checkpoint_every=1, on_policy=0.3)
    process = start(models, [(asdict(training), {}, *names.values(), tmp_path / "killed")], {})
    while not list(tmp_path.glob("killed/checkpoint-0000000[3-9]")):
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "trained").exists()
    told: list[str] = []
    resumed = run(models, tmp_path / "killed", training, tell=lambda *each: told.append(each[2]), **names)
    whole = run(models, tmp_path / "whole", training, **names)
    assert 0 < len(told) < 20
    assert resumed.curve == whole.curve
    assert_close(resumed.state, whole.state, rtol=0, atol=0)
    assert os.listdir(tmp_path / "killed") == ["trained"]


def test_what_is_kept_are_the_best_weights_and_training_ends_when_they_are_long_past(
    models: Path, tmp_path: Path
) -> None:
    training = replace(TRAINING, tokens=60 * BATCH * LENGTH, learning_rate=2e-3, evaluate_every=2, patience=3)
    trained = run(models, tmp_path / "work", training, count=4)
    held_out = {point["step"]: point["held_out"] for point in trained.curve if point["held_out"] is not None}
    assert trained.stopped_early
    assert 0 < trained.best_step == min(held_out, key=held_out.__getitem__)
    assert trained.steps == trained.best_step + 2 * 3
    student = opened(models, "student", trained.state)
    found = divergence(student, opened(models, "teacher"), windows(5, seed=1))
    assert found == pytest.approx(held_out[trained.best_step], rel=1e-5)


def test_a_teacher_that_was_asked_before_is_as_good_as_one_in_memory(models: Path, tmp_path: Path) -> None:
    """With all tokens kept. They are in float16, so p is wrong by 2⁻¹¹ |log p|, and |log p| is at most 16 here."""
    live = run(models, tmp_path / "live")
    cached = run(models, tmp_path / "cached", replace(TRAINING, teacher_top_k=VOCABULARY))
    assert_close(column(cached.curve, "loss"), column(live.curve, "loss"), rtol=16 * 2**-11, atol=0)
    assert_close(column(cached.curve, "held_out"), column(live.curve, "held_out"), rtol=16 * 2**-11, atol=0)


@pytest.mark.parametrize("family", ["", "gpt2-"])
def test_low_rank_products_are_merged_and_nothing_else_is_changed(models: Path, tmp_path: Path, family: str) -> None:
    names = {"student": f"{family}student", "teacher": f"{family}teacher"}
    trained = run(models, tmp_path / "work", replace(TRAINING, lora_rank=2), **names)
    before = opened(models, names["student"])
    student = opened(models, names["student"], trained.state)
    held_out = column(trained.curve, "held_out")
    assert held_out.min() < held_out[0]
    found = divergence(student, opened(models, names["teacher"]), windows(5, seed=1))
    assert found == pytest.approx(float(held_out.min()), rel=1e-5)
    layers = {name for name, module in before.named_modules() if isinstance(module, nn.Linear) and "layers" in name}
    for name, parameter in before.named_parameters():
        change = trained.state[name] - parameter
        if name.removesuffix(".weight") in layers or (".c_" in name and name.endswith("weight")):
            assert 0 < torch.linalg.matrix_rank(change, atol=1e-5) <= 2
        else:
            assert not change.any()


def test_only_what_the_student_writes_counts_where_it_writes(models: Path, tmp_path: Path) -> None:
    trained = run(models, tmp_path / "work", replace(TRAINING, tokens=BATCH * LENGTH, on_policy=1.0))
    student, teacher = opened(models, "student"), opened(models, "teacher")
    cut = cut_of(0, LENGTH, 1.0, 0)
    assert cut is not None
    tokens = windows(24)[batch_of(0, BATCH, 24, 0)]
    draws = torch.rand(BATCH, LENGTH - cut, generator=chance("draws", 0, 0))
    written = continued(student, empty_cache(student), tokens, draws)
    assert torch.equal(written[:, :cut], tokens[:, :cut])
    assert trained.curve[1]["loss"] == pytest.approx(divergence(student, teacher, written, cut - 1), rel=1e-5)


@pytest.mark.parametrize("objective", [Objective(divergence=0, hidden=1.0),
                                       Objective(divergence=0, relations=1.0, relation_heads=2)])  # fmt: skip
def test_a_student_of_other_widths_learns_from_states(models: Path, tmp_path: Path, objective: Objective) -> None:
    loss = column(run(models, tmp_path / "work", TRAINING, objective, student="narrow", count=4).curve, "loss")
    assert loss[-1] < 0.99 * loss[0]


def test_what_a_stage_put_into_the_student_is_trained_and_comes_back(models: Path, tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.log_scale.exp()

    def prepare(model: nn.Module) -> None:
        layer = model.get_submodule("model.layers.1.mlp.down_proj")
        layer.log_scale, layer.__class__ = nn.Parameter(torch.zeros(1)), Scaled

    state = run(models, tmp_path / "work", prepare=prepare).state
    assert state["model.layers.1.mlp.down_proj.log_scale"].abs() > 0
    assert len(state) == len(list(opened(models, "student").parameters())) + 1


def test_without_a_teacher_there_is_cross_entropy(models: Path, tmp_path: Path) -> None:
    plain = Objective(divergence=0, cross_entropy=1.0)
    trained = run(models, tmp_path / "work", objective=plain, teacher=None)
    assert trained.curve[-1]["loss"] < trained.curve[1]["loss"]
    with pytest.raises(ValueError, match="divergence=1 needs a teacher"):
        run(models, tmp_path / "other", teacher=None)


def test_a_loss_that_is_no_number_stops_training_and_leaves_the_last_checkpoint(models: Path, tmp_path: Path) -> None:
    training = replace(TRAINING, learning_rate=1e30, checkpoint_every=1)
    with pytest.raises(NumericalError, match="step 2: the .* is nan. The last checkpoint is as it was"):
        run(models, tmp_path / "work", training)
    assert os.listdir(tmp_path / "work") == ["checkpoint-00000001"]


def test_what_is_impossible_is_said_before_training(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gpt2 models have no layer of their own for values"):
        run(models, tmp_path / "a", objective=Objective(relations=1.0, relation_heads=2), student="gpt2-student")
    with pytest.raises(RequestError, match="needs a GPU"):
        run(models, tmp_path / "b", replace(TRAINING, optimizer="adamw8bit"))
    for training, words in (
        (replace(TRAINING, sequence_length=8), "sequence_length=8, but windows have 16 tokens"),
        (replace(TRAINING, tokens=63), "tokens=63 are less than one batch of 4 windows of 16 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            run(models, tmp_path / "c", training)
    with pytest.raises(ValueError, match="teacher_top_k=4 keeps what a teacher says"):
        run(models, tmp_path / "d", replace(TRAINING, teacher_top_k=4), Objective(hidden=1.0))
    with pytest.raises(ValueError, match="cannot be merged into layers that are prepared"):
        run(models, tmp_path / "e", replace(TRAINING, lora_rank=2), prepare=lambda model: None)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"sequence_length": 1}, "sequence_length=1 must be 2 or more"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"warmup": 1.5}, "warmup=1.5 must lie in 0 … 1"),
        ({"optimizer": "sgd"}, "optimizer='sgd' must be one of adamw, adamw8bit"),
        ({"on_policy": 0.5, "teacher_top_k": 8}, "on_policy needs the teacher during training"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Training(**option)
