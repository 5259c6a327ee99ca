"""The output folder: shards appear one by one in `<output>.partial`, the finished folder in one rename.

A reader sees no checkpoint or a whole one. What belongs to any copy of the model (tokenizer, chat template,
generation settings, licence) is copied; every tensor that no stage touched is copied bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoint.adapter import ADAPTER
from compress.checkpoint.manifest import replace_durably, write_atomically
from compress.errors import OutputError, writing
from compress.models.headers import Folder

KEPT = (
    "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja",
    "chat_template*", "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of the original folder that belong to the compressed model too. Anything else, scores and logs of the
original, say, would tell a lie about the new one."""


CONSENT = "overwrite"
"""A file in the scratch folder that says the run may replace what was at the output when it began."""


class OutputFolder:
    """A checkpoint under construction."""

    def __init__(self, final: Path, num_shards: int) -> None:
        self.final = final.resolve()
        self.partial = self.final.with_name(f"{self.final.name}.partial")
        self.replaced = self.final.with_name(f".{self.final.name}.replaced")
        self.scratch = self.partial / ".netsuke"
        self.num_shards = num_shards
        self.metadata: Mapping[str, str] = {}
        """What the header of each shard says besides its tensors."""

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise OutputError where something is in the way that must not be touched, or nothing can be written."""
        parent = next(path for path in self.final.parents if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(f"{self.final}: {parent} is no folder one may write in. Choose another --output")
        consent = overwrite or (resume and self.unfinished and (self.scratch / CONSENT).exists())
        if self.final.exists() and not consent and (not self.final.is_dir() or any(self.final.iterdir())):
            raise OutputError(f"{self.final}: exists already. Choose another --output, or give --overwrite")
        if resume and not self.partial.exists():
            raise OutputError(f"{self.partial}: there is no unfinished run to resume. Run without --resume")
        if self.unfinished and not resume and not overwrite:
            raise OutputError(
                f"{self.partial}: holds an unfinished run. Continue it with --resume, or drop it with --overwrite"
            )
        if (
            self.partial.exists()
            and not self.unfinished
            and any(path != self.scratch for path in self.partial.iterdir())
        ):
            raise OutputError(f"{self.partial}: is in the way, and no run of netsuke left it. Move it elsewhere")
        if self.replaced.exists() and not resume:
            raise OutputError(f"{self.replaced}: holds what an interrupted --overwrite was about to replace. Move it")

    @property
    def unfinished(self) -> bool:
        """Whether a run got far enough to leave a manifest, and so something to lose."""
        return (self.scratch / "manifest.json").exists()

    def open(self, *, resume: bool) -> None:
        with writing(self.partial):
            if not resume:
                shutil.rmtree(self.partial, ignore_errors=True)
            self.scratch.mkdir(parents=True, exist_ok=True)
            if self.final.exists():
                (self.scratch / CONSENT).touch()

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{self.num_shards:05}.safetensors"

    @property
    def weight_files(self) -> list[Path]:
        """What has been written of weights so far, an adapter included."""
        return [*self.partial.glob("*.safetensors"), *self.partial.glob(f"{ADAPTER}/*.safetensors")]

    def write_shard(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.partial / self.shard_name(index)
        temporary = path.with_suffix(".tmp")
        contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        with writing(path):
            try:
                save_file(contiguous, temporary, metadata={"format": "pt", **self.metadata})
            except Exception as error:
                if type(error).__name__ != "SafetensorError":
                    raise
                raise OSError(_errno(error), str(error)) from error  # the library hides the disk's own error
            temporary.chmod((self.partial / ".netsuke").stat().st_mode & 0o666)  # the library makes it private
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            replace_durably(temporary, path)

    def write_rest(self, source: Folder, config: Mapping[str, Any], index: Mapping[str, str], total: int) -> None:
        """Side files, index and config. `index`: tensor name → shard name; `total`: bytes of all tensors."""
        self.copy_side_files(source)
        weight_map = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        self.write_json("model.safetensors.index.json", weight_map)
        self.write_json("config.json", config)

    def copy_side_files(self, source: Folder) -> None:
        """What the original has besides weights and config: tokenizer, chat template, licence."""
        with writing(self.partial):
            for file in sorted(source.path.iterdir()):
                if file.is_file() and any(fnmatchcase(file.name, pattern) for pattern in KEPT):
                    shutil.copyfile(file, self.partial / file.name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self.partial / name, (json.dumps(content, indent=2) + "\n").encode())

    def publish(self) -> None:
        """Make the finished folder appear under its name, in place of one that was there before.

        The manifest goes last: killed at any moment, the run can be resumed or is done.
        """
        with writing(self.final):
            for file in self.scratch.glob("activations-*"):
                file.unlink()
            if self.final.exists():
                os.replace(self.final, self.replaced)
            os.replace(self.partial, self.final)
            shutil.rmtree(self.final / self.scratch.name, ignore_errors=True)
            shutil.rmtree(self.replaced, ignore_errors=True)


def _errno(error: Exception) -> int:
    """The operating system's error number inside a safetensors error message."""
    import errno
    import re

    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return int(next(filter(None, found.groups()))) if found else errno.EIO
