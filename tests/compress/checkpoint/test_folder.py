from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint.folder import OutputFolder
from compress.errors import OutputError
from compress.models.headers import read_folder


def started(final: Path) -> OutputFolder:
    folder = OutputFolder(final, 2)
    folder.open(resume=False)
    return folder


def test_nothing_is_visible_before_it_is_published(tmp_path: Path) -> None:
    folder = started(tmp_path / "out")
    folder.write_shard(0, {"x": torch.ones(3)})
    assert not folder.final.exists()
    folder.publish()
    assert torch.equal(load_file(folder.final / folder.shard_name(0))["x"], torch.ones(3))
    assert not folder.partial.exists()
    assert not (folder.final / ".netsuke").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        OutputFolder(tmp_path / "out", 1).check(resume=False, overwrite=False)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_an_unfinished_run_is_not_dropped_without_being_told(tmp_path: Path) -> None:
    folder = started(tmp_path / "out")
    folder.check(resume=False, overwrite=False)
    (folder.scratch / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"--resume.*--overwrite"):
        folder.check(resume=False, overwrite=False)


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no unfinished run to resume"):
        OutputFolder(tmp_path / "out", 1).check(resume=True, overwrite=False)


def test_overwriting_replaces_the_old_folder_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    folder = started(tmp_path / "out")
    folder.write_shard(0, {"x": torch.ones(1)})
    folder.publish()
    assert [file.name for file in folder.final.iterdir()] == [folder.shard_name(0)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_side_files_are_copied_and_weights_are_not(tiny: Path, tmp_path: Path) -> None:
    folder = started(tmp_path / "out")
    folder.write_rest(read_folder(tiny), {"a": 1}, {"x": "shard"}, total=4)
    assert (folder.partial / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert json.loads((folder.partial / "config.json").read_text()) == {"a": 1}
    assert not (folder.partial / "model.safetensors").exists()


def test_a_folder_that_no_run_left_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="no run of netsuke left it"):
        OutputFolder(tmp_path / "out", 1).check(resume=False, overwrite=True)


def test_a_run_that_may_overwrite_may_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    folder = started(tmp_path / "out")
    (folder.scratch / "manifest.json").write_text("{}")
    folder.check(resume=True, overwrite=False)


def test_an_output_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is no folder one may write in"):
        OutputFolder(tmp_path / "file" / "out", 1).check(resume=False, overwrite=False)
