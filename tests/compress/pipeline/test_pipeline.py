from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress.calibrate.block import Block
from compress.checkpoint.compressed_tensors import CompressedTensors
from compress.checkpoint.folder import OutputFolder
from compress.core.qtensor import QuantizedTensor
from compress.errors import OutputError, StorageError, VerificationError
from compress.pipeline import prepare
from compress.pipeline.job import Job

SMALL = [
    "gptq.group_size=32",
    "calibration.samples=8",
    "calibration.sequence_length=48",
    "evaluation.samples=4",
]


def compressed(tiny: Path, text: Path, output: Path, *more: str, **options: Any) -> dict[str, Any]:
    return compress.run(
        "w4a16-gptq", model=str(tiny), output=output, calibration=str(text), overrides=[*SMALL, *more], **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint except the reports, which carry times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if not file.name.startswith("report")}


@pytest.fixture(scope="module")
def finished(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    compressed(tiny, text, output)
    return output


def test_a_run_leaves_a_whole_folder(finished: Path) -> None:
    names = set(contents(finished))
    assert {"config.json", "recipe.yaml", "tokenizer.json", "model.safetensors.index.json", "README.md"} <= names
    report = json.loads((finished / "report.json").read_text())
    keys = "recipe model stages bytes_before bytes_after bits_per_weight calibration peak_memory_bytes seconds versions"
    assert set(keys.split()) | {"evaluation", "gates"} <= set(report)
    assert len(report["stages"][0]["layers"]) == 21
    assert report["calibration"]["tokens"] == 8 * 48


def test_the_models_own_card_stands_at_the_end_of_the_folders(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Its own card\n")
    compress.run("w4a16-rtn", model=str(tmp_path / "model"), output=tmp_path / "out", overrides=["rtn.group_size=32"])
    told = (tmp_path / "out" / "README.md").read_text()
    assert told.startswith("---\nbase_model: model\n")
    assert "\nlicense: apache-2.0\n" in told
    assert told.endswith("\n# Its own card\n")


def test_a_finished_block_is_let_go_before_the_next_is_worked_on(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else memory would hold two blocks' worth of codes and statistics."""
    begun: list[weakref.ref[Block]] = []
    work = Job.work

    def watched(self: Job, block: Block) -> None:
        assert not any(before() for before in begun)
        begun.append(weakref.ref(block))
        work(self, block)

    monkeypatch.setattr(Job, "work", watched)
    compressed(tiny, text, tmp_path / "out")
    assert len(begun) == 3


def test_what_was_planned_is_what_was_written(tiny: Path, text: Path, finished: Path) -> None:
    plan = prepare("w4a16-gptq", model=str(tiny), calibration=str(text), overrides=SMALL)
    assert plan.bytes_after == sum(file.stat().st_size for file in finished.glob("*.safetensors"))


def test_transformers_loads_the_folder_and_computes_what_we_compute(finished: Path) -> None:
    pytest.importorskip("compressed_tensors")
    theirs = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    ours, tokenizer = compress.load(finished, dtype=torch.float32)
    tokens = tokenizer("the carver leaves only what matters", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens).logits
    assert ((got - expected).norm() / expected.norm()).item() < 1e-5


def test_scoring_reads_the_exported_folder(finished: Path) -> None:
    text = json.loads((finished / "report.json").read_text())["evaluation"]["texts"][0]
    assert 0 < text["kl_divergence"] < 1
    assert 0 < text["top1_agreement"] <= 1
    assert text["perplexity_ratio"] == pytest.approx(text["perplexity"] / text["baseline_perplexity"])


def test_two_runs_write_the_same_bytes(tiny: Path, text: Path, finished: Path, tmp_path: Path) -> None:
    compressed(tiny, text, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished)


KILLED = """
import json, os, signal, sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import compress.pipeline

folder, request = Path(sys.argv[1]), json.loads(sys.argv[2])


def run_until(blocks):
    output = folder / str(blocks)
    manifest = output.with_suffix(".partial") / ".netsuke" / "manifest.json"

    def kill(phase, share, words):
        if manifest.exists() and json.loads(manifest.read_text())["blocks"] >= blocks:
            os.kill(os.getpid(), signal.SIGKILL)

    compress.run("w4a16-gptq", output=output, progress=kill, **request)


for blocks in (1, 2, 3):
    child = os.fork()
    if not child:
        run_until(blocks)
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs, each named after the blocks that were finished when its run was killed. The runs are forks of one
    process, which has imported all that takes long."""
    folder = tmp_path_factory.mktemp("killed")
    request = json.dumps({"model": str(tiny), "calibration": str(text), "overrides": SMALL})
    environment = dict(os.environ, PYTHONPATH=str(Path(compress.__file__).parents[1]))
    command = [sys.executable, "-c", KILLED, str(folder), request]
    run = subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=False)
    assert run.returncode == 0, run.stderr.decode()
    return folder


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_killed_run_resumes_to_the_same_bytes(
    tiny: Path, text: Path, finished: Path, killed: Path, blocks: int
) -> None:
    output = killed / str(blocks)
    assert not output.exists()
    compressed(tiny, text, output, resume=True)
    assert contents(output) == contents(finished)


def test_a_run_with_two_streams_and_rounded_inputs_resumes_to_the_same_bytes(
    tiny: Path, text: Path, tmp_path: Path
) -> None:
    settings = ["gptq.scheme=w4a8", "gptq.asymmetric=true"]

    def interrupt(phase: str, share: float, words: str) -> None:
        if words == "block 3 of 3":
            raise KeyboardInterrupt

    compressed(tiny, text, tmp_path / "whole", *settings)
    with pytest.raises(KeyboardInterrupt):
        compressed(tiny, text, tmp_path / "out", *settings, progress=interrupt)
    compressed(tiny, text, tmp_path / "out", *settings, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w4a8", "w4a8-fp8"])
def test_rounded_inputs_are_loaded_as_they_were_scored(scheme: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    compressed(tiny, text, tmp_path / "out", f"gptq.scheme={scheme}")
    tokens = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(tokens).logits
        ours = compress.load(tmp_path / "out", dtype=torch.float32)[0](tokens).logits
    assert ((theirs - ours).norm() / theirs.norm()).item() < 1e-3


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "mxfp4a16", "nvfp4a16"])
def test_float_weights_are_loaded_as_they_were_scored(scheme: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    settings = [f"rtn.scheme={scheme}", "rtn.group_size=auto", "checkpoint.compression=auto", *SMALL[1:3]]
    compress.run("w4a16-rtn", model=str(tiny), output=tmp_path / "out", calibration=str(text), overrides=settings)
    tokens = torch.arange(2, 42).view(2, 20)
    dtype = torch.bfloat16 if "fp4" in scheme else torch.float32  # the package decompresses FP4 to that only
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)(tokens).logits.float()
        ours = compress.load(tmp_path / "out", dtype=dtype)[0](tokens).logits.float()
    assert ((theirs - ours).norm() / theirs.norm()).item() < (0.02 if dtype == torch.bfloat16 else 1e-3)


def test_a_resumed_run_must_be_the_same_run(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compressed(tiny, text, tmp_path / "out", progress=interrupt)
    with pytest.raises(OutputError, match="another recipe, model or calibration text"):
        compressed(tiny, text, tmp_path / "out", "gptq.damping=0.5", resume=True)


def test_a_full_disk_keeps_what_is_finished(
    tiny: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the second shard is synced; with room again the run goes on."""
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if str(target).endswith(".safetensors"):
            calls.append(target)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match="No space left on device.*--resume"):
        compressed(tiny, text, tmp_path / "out")
    monkeypatch.undo()
    compressed(tiny, text, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(finished)


def test_a_layer_that_does_not_decode_to_what_was_encoded_stops_the_run(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one layer flips between the walk and the disk."""
    encode = CompressedTensors.encode

    def damaged(self: CompressedTensors, name: str, tensor: QuantizedTensor, *rest: Any) -> dict[str, torch.Tensor]:
        tensors = encode(self, name, tensor, *rest)
        if name.endswith("layers.1.mlp.down_proj"):
            tensors[f"{name}.weight_packed"][0, 0] ^= 0x70
        return tensors

    monkeypatch.setattr(CompressedTensors, "encode", damaged)
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj does not decode"):
        compressed(tiny, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_computes_something_else_is_not_published(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last norm is lost on its way to the disk."""
    write = OutputFolder.write_shard

    def damaged(self: OutputFolder, index: int, tensors: dict[str, torch.Tensor]) -> None:
        if "model.norm.weight" in tensors:
            tensors = tensors | {"model.norm.weight": tensors["model.norm.weight"] * 1.01}
        write(self, index, tensors)

    monkeypatch.setattr(OutputFolder, "write_shard", damaged)
    with pytest.raises(VerificationError, match="reloaded, it computes logits that differ"):
        compressed(tiny, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stages_compose_in_code(tiny: Path, tmp_path: Path) -> None:
    pipeline = compress.Pipeline([compress.RTN(scheme="w8a16", group_size=None)])
    report = pipeline.run(model=str(tiny), output=tmp_path / "out")
    assert report["bits_per_weight"] == pytest.approx(8.2, abs=0.2)
    assert report["evaluation"] is None
    assert "no text to score on" in report["evaluation_note"]


def interrupt(phase: str, done: float, words: str) -> None:
    if words == "block 2 of 3":
        raise KeyboardInterrupt
