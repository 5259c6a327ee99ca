"""The scripts that time kernels, as far as they go without a GPU: what is counted, chosen, written and said."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import bench_cpu
import bench_kernels
import kernel_plot
import kernel_timing
import tune_kernels
from kernel_rivals import RIVALS
from kernel_timing import LAYERS, OURS, Device, Layer, cold_copies, roofline_seconds

from quant_kernels import tuning
from quant_kernels.tuning import Config

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = Device(4.3e12, {"bf16": 790e12, "8-bit": 1400e12})
REPORT: dict[str, Any] = {
    "device": "NVIDIA H200",
    "commit": "0123456789abcdef",
    "date": "2026-11-24T12:00:00+00:00",
    "versions": {"torch": "2.11"},
    "replays": 50,
}


def row(kernel: str, tokens: int, microseconds: float, **more: Any) -> dict[str, Any]:
    known = {"layer": "8B o", "outputs": 4096, "inputs": 4096, "kernel": kernel}
    return known | {"tokens": tokens, "microseconds": microseconds} | more


@pytest.mark.parametrize(
    ("scheme", "layer", "tokens", "microseconds"),
    [
        ("bf16", "8B qkv", 1, 11.7),
        ("bf16", "70B gate+up", 4096, 4871),
        ("w8a16", "8B down", 64, 14.2),
        ("w8a16", "70B o", 128, 21.7),
        ("w8a8", "70B qkv", 16, 19.6),
        ("w8a8", "8B gate+up", 1024, 172),
        ("w4a16", "8B o", 128, 5.4),
        ("w4a8", "8B down", 4096, 344),
    ],
)
def test_the_roofline_is_that_of_the_design(scheme: str, layer: str, tokens: int, microseconds: float) -> None:
    assert roofline_seconds(scheme, LAYERS[layer], tokens, H200) * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_copies_are_distinct_and_more_than_a_cache_holds() -> None:
    weights = (torch.zeros(10), torch.zeros(2))
    copies = cold_copies(weights, 60e6)
    assert len(copies) == 4
    assert len({each[0].data_ptr() for each in copies}) == 4
    assert len(cold_copies(weights, 1e9)) == 1


@pytest.mark.parametrize("name", OURS)
def test_operators_run_on_what_is_made_for_them(name: str) -> None:
    kernel, layer = OURS[name], Layer(64, 256)
    y = kernel.run(kernel.weights(layer, DEVICE), kernel.activations(3, layer.inputs, DEVICE))
    assert y.shape == (3, 64)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert y.any()


@pytest.mark.parametrize("name", ["cuBLAS bf16", "torch _int_mm"])
def test_rivals_of_torch_that_a_cpu_has_too_run(name: str) -> None:
    kernel, layer = RIVALS[name], Layer(64, 256)
    y = kernel.run(kernel.weights(layer, DEVICE), kernel.activations(32, layer.inputs, DEVICE))
    assert y.shape == (32, 64)


def test_speed_is_compared_on_the_same_layer_and_tokens() -> None:
    rows = [row("w4a16", 1, 4.0), row("w4a16", 2, 5.0), row(bench_kernels.BASELINE, 1, 10.0), {"layer": "8B o",
            "kernel": "gemlite A16W4", "error": "no"}]  # fmt: skip
    speedups = [each.get("speedup") for each in bench_kernels.compared(rows)]
    assert speedups == [2.5, None, 1.0, None]


def test_a_report_is_rendered_with_gaps_and_failures() -> None:
    results = [
        row("w4a16", 1, 4.0, of_roofline=0.525, speedup=2.5),
        row("w4a16", 16, 123.44),
        row("torch _int_mm", 16, 8.0, speedup=1.25),
        {"layer": "8B o", "outputs": 4096, "inputs": 4096, "kernel": "gemlite A16W4", "error": "RuntimeError: no"},
    ]
    text = bench_kernels.render(REPORT | {"results": results})
    assert "NVIDIA H200, commit 0123456789ab, 2026-11-24, torch 2.11." in text
    assert "**8B o**, 4096 × 4096\n\n| kernel | 1 | 16 |\n|---|---|---|\n" in text
    assert "| w4a16 | 4.0 · 52% · 2.50 | 123.4 |\n" in text
    assert "| torch _int_mm | – | 8.0 · 1.25 |\n" in text
    assert "| gemlite A16W4 | failed | failed |\n" in text
    assert "torch _int_mm: int32 results, no scales." in text


def test_a_run_is_rendered_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(REPORT | {"results": [row("w4a16", 1, 4.0)]}))
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--render", str(file)])
    assert bench_kernels.main() == 0
    assert "| w4a16 | 4.0 |" in capsys.readouterr().out


def test_a_run_is_published_between_the_marks_with_a_picture(tmp_path: Path) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "run.json"
    readme.write_text(f"before\n{bench_kernels.BEGIN}\nold\n{bench_kernels.END}\nafter\n")
    rows = [row("w4a16", 1, 4.0, of_roofline=0.5), row("w4a16", 16, 4.4, of_roofline=0.25),
            row("gemlite A16W4", 1, 8.0, of_roofline=1.0)]  # fmt: skip
    file.write_text(json.dumps(REPORT | {"results": rows}))
    bench_kernels.publish(file, readme)
    bench_kernels.publish(file, readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.count("| w4a16 | 4.0 · 50%") == text.count("](results/run.svg)") == 1
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    (ours,) = re.findall(r'points="([^"]*)" fill="none" stroke="#b3432b"', (tmp_path / "run.svg").read_text())
    (_, high), (_, low) = (tuple(map(float, point.split(","))) for point in ours.split())
    bottom = kernel_plot.HEIGHT - kernel_plot.BOTTOM
    assert (bottom - high) == pytest.approx(2 * (bottom - low), abs=0.2)


def test_no_number_is_printed_when_a_test_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--results", str(tmp_path)])
    monkeypatch.setattr(bench_kernels, "missing_device", lambda: None)
    monkeypatch.setattr(bench_kernels, "tests_pass", lambda _: False)
    assert bench_kernels.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "tests fail on this device, so nothing was timed" in printed.err
    assert not any(tmp_path.iterdir())


def test_a_failure_of_ours_is_a_row_of_a_report_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = []

    def timed(kernel: Any, layer: Layer, known: dict[str, Any], *_: Any) -> list[dict[str, Any]]:
        written.append(
            [each["layer"] for file in tmp_path.iterdir() for each in json.loads(file.read_text())["results"]]
        )
        if kernel.name == "w4a16" and layer == LAYERS["8B o"]:
            raise RuntimeError("no room\nat all")
        return [known | {"tokens": 1, "microseconds": 4.0}]

    for name, value in {
        "missing_device": lambda: None, "tests_pass": lambda _: True, "facts": lambda _: dict(REPORT),
        "measured_limits": lambda _: H200, "timed": timed,
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_kernels, name, value)
    words = ["--layers", "8B o", "8B down", "--kernels", "w4a16", "w8a16", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *words])
    assert bench_kernels.main() == 1
    results = json.loads((tmp_path / "nvidia-h200.json").read_text())["results"]
    assert [each.get("error") for each in results] == ["RuntimeError: no room", None, None, None, None, None]
    assert written == [[]] * 3 + [["8B o"] * 3] * 3
    printed = capsys.readouterr()
    assert "| w4a16 | failed |" in printed.out
    assert "error: w4a16 failed" in printed.err


def test_the_tests_of_an_operator_are_those_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def record(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(bench_kernels.subprocess, "run", record)
    assert not bench_kernels.tests_pass(list(OURS))
    files = [word for word in commands[0] if word.endswith(".py")]
    assert len(files) == len(set(kernel_timing.MODULES.values()))
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
@pytest.mark.parametrize("script", ["bench_kernels.py", "tune_kernels.py"])
def test_a_machine_without_a_gpu_is_told_so(script: str) -> None:
    done = run(script)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: torch sees no CUDA device here")


@pytest.mark.parametrize("script", [bench_kernels, tune_kernels], ids=["bench_kernels", "tune_kernels"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "--layers"),
        (["--tokens", "0"], "0 is not positive"),
        (["--layers", "7B"], "invalid choice: '7B'"),
    ],
)
def test_help_and_bad_arguments(
    arguments: list[str], words: str, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    with pytest.raises(SystemExit):
        script.main()
    printed = capsys.readouterr()
    assert words in (printed.out if arguments == ["--help"] else printed.err)


@pytest.mark.parametrize("block_k", [False, True])
@pytest.mark.parametrize("start", [Config(16, 64), Config(128, 256, 256, split_k=32, num_warps=8, num_stages=6)])
def test_candidates_are_the_start_and_its_neighbours(start: Config, block_k: bool) -> None:
    made = tune_kernels.candidates(start, block_k=block_k)
    assert made[0] == start
    assert 4 <= len(made) == len(set(made)) <= 10
    for config in made[1:]:
        (field,) = (name for name, value in asdict(config).items() if value != getattr(start, name))
        least, most = tune_kernels.LIMITS[field]
        assert least <= getattr(config, field) <= most
        assert block_k or field != "block_k"


def test_a_table_that_is_written_is_what_operators_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Test 1")
    tuning._table.cache_clear()
    layer, device, file = LAYERS["8B o"], torch.device("cuda"), tmp_path / "nvidia-test-1.json"
    first, second = Config(16, 32, split_k=7), Config(64, 128, swap=True)
    tune_kernels.update(file, {tune_kernels.key("w4a16", layer, 1): first})
    tune_kernels.update(file, {tune_kernels.key("w4a8_grouped", layer, 4096): second})
    assert tuning.tabled("w4a16", device, *layer, 128, 16) == first
    assert tuning.tabled("w4a16", device, *layer, 128, 17) is None
    assert tuning.tabled("w4a8", device, *layer, 64, 600) == second
    assert tuning.tabled("w4a8", device, *layer, 0, 600) is None


@pytest.mark.parametrize("operator", OURS)
def test_operators_look_where_the_table_has_their_entries(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def tabled(name: str, _: Any, rows: int, columns: int, group_size: int, tokens: int) -> Config:
        looked.append(f"{name} {rows}x{columns} g{group_size} m{tuning.bucket(tokens)}")
        return Config(16, 16)

    monkeypatch.setattr(kernel_timing.MODULES[operator], "tabled", tabled)
    for tokens in tune_kernels.TOKENS:
        layer = LAYERS["8B down"]
        tune_kernels.current(operator, layer, tokens)
        assert looked[-1] == tune_kernels.key(operator, layer, tokens)


def test_a_candidate_is_used_only_while_it_is_tried() -> None:
    layer, candidate = LAYERS["8B o"], Config(16, 16)
    before = tune_kernels.current("w4a8", layer, 16)
    with tune_kernels.using("w4a8", candidate):
        assert tune_kernels.current("w4a8", layer, 16) == candidate
    assert tune_kernels.current("w4a8", layer, 16) == before != candidate


@pytest.mark.gpu
def test_a_small_layer_is_timed_on_the_device() -> None:
    kernels = [*OURS.values(), RIVALS[bench_kernels.BASELINE]]
    rows = bench_kernels.measure(
        kernels, {"small": Layer(512, 512)}, H200, argparse.Namespace(tokens=[1, 64], replays=3)
    )
    assert len(rows) == 2 * len(kernels)
    assert all(row["microseconds"] > 0 and row["speedup"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OURS)
def test_a_small_layer_is_tuned_on_the_device(operator: str) -> None:
    layer = Layer(512, 512)
    found = tune_kernels.tune(OURS[operator], layer, [16], replays=3)
    assert list(found) == [tune_kernels.key(operator, layer, 16)]


def test_a_random_model_is_timed_beside_bfloat16_in_the_same_run(tmp_path: Path) -> None:
    sizes = {"blocks": 1, "hidden": 128, "ffn": 256, "heads": 4, "kv-heads": 2, "vocabulary": 64, "batch": 2,
             "prompt-tokens": 4, "tokens": 3, "repetitions": 1}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    done = run("bench_decode.py", "--device=cpu", f"--results={tmp_path}", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "cpu-decode.json").read_text())
    assert [row["scheme"] for row in report["results"]] == ["w4a16", "w8a16"]
    for row in report["results"]:
        assert row["tokens_per_second"] > 0
        assert row["ratio_to_bfloat16"] > 0
        assert row["scheme"] in done.stdout


def test_every_open_route_of_a_cpu_kernel_is_timed_at_the_tokens_it_takes() -> None:
    done = run("bench_cpu.py", "--size=128", "--tokens", "1", "3", "--repetitions=1")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| int")]
    assert {cells[0] for cells in rows} == {row.title for row in bench_cpu.ROWS}
    for _, route, one, three in rows:
        assert float(one) >= 0  # a busy machine may need a hundred times as long, which is 0.00
        assert (three == "–") == ("two columns at a time" in route)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True)
