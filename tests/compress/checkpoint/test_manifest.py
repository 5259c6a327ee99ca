from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.checkpoint.manifest import Manifest, run_key
from compress.errors import OutputError
from compress.models.headers import read_folder


def test_a_manifest_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest.json", "key", blocks=3, seconds=[1.5], layers=[[{"name": "x"}]])
    manifest.save()
    assert Manifest.load(manifest.path, "key") == manifest


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    Manifest(tmp_path / "manifest.json", "key").save()
    with pytest.raises(OutputError, match="another recipe, model or calibration text"):
        Manifest.load(tmp_path / "manifest.json", "other key")


def test_a_damaged_manifest_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be resumed from"):
        Manifest.load(tmp_path / "manifest.json", "key")


def test_the_key_changes_with_recipe_data_and_weights(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(tiny, other)
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    keys = {
        run_key("recipe", read_folder(tiny), "data"),
        run_key("recipe 2", read_folder(tiny), "data"),
        run_key("recipe", read_folder(tiny), "data 2"),
        run_key("recipe", read_folder(other), "data"),
    }
    assert len(keys) == 4
    assert run_key("recipe", read_folder(tiny), "data") in keys
