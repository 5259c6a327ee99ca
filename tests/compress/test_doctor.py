"""The doctor names a backend for every scheme, and has tried it."""

from __future__ import annotations

import json

import pytest
import torch

from compress import doctor
from compress.core.scheme import WEIGHT_BITS, parse_scheme
from compress.doctor import diagnose, kernel_error, sparse_error
from quant_kernels import KERNELS


def test_it_has_the_keys_that_scripts_read_and_is_json() -> None:
    found = json.loads(json.dumps(diagnose()))
    assert {"python", "torch", "triton", "transformers", "device", "backends"} <= found.keys()


def test_every_scheme_gets_a_kernel_that_exists_and_was_tried() -> None:
    backends = diagnose()["backends"]
    assert list(backends) == [*doctor.SCHEMES, "2:4"]
    names = {kernel.name for kernel in KERNELS} | {"cusparselt", "cutlass", "dense"}
    for entry in backends.values():
        assert entry["backend"] in names
        assert "agrees with the reference" in entry["reason"]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise doctor.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", absent)
    assert diagnose()["triton"] is None


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_chosen_kernel_in_float32_is_exact(bits: int) -> None:
    assert kernel_error(parse_scheme(f"w{bits}a16", 64), torch.float32, "cpu") < 1e-6


@pytest.mark.parametrize("name", ["w8a8", "fp8", "w4a4", "nvfp4a16"])
def test_so_it_is_where_inputs_are_rounded_or_weights_are_floats(name: str) -> None:
    assert kernel_error(parse_scheme(name), torch.float32, "cpu") < 1e-6


def test_sparse_weights_are_tried_as_well() -> None:
    assert sparse_error(torch.float32, "cpu") < 1e-6


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_kernel_that_computes_wrongly_is_called_wrong(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernel_error", lambda *arguments: error)
    assert "COMPUTES WRONGLY HERE" in diagnose()["backends"]["w4a16"]["reason"]
