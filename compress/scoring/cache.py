"""What `netsuke eval` measured before, and by what one measurement is told from another.

A measurement is of a model, of questions, and of the program that made it. A model is known by a hash of every file in
its folder that can be read when it is loaded, a program by a hash of its sources and the versions of what it stands on:
nobody has to remember to raise a number, and what is not known to be the same is measured anew. Questions are the keys
within a journal (`eval.journal`), of which each model has its own under each program.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from compress.checkpoint.adapter import ADAPTER
from compress.errors import RequestError, eval_package

if TYPE_CHECKING:
    from eval.journal import Journal

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "compress/core", "compress/models", "compress/checkpoint", "compress/runtime", "compress/scoring/gguf.py",
    "compress/scoring/opened.py", "compress/errors.py", "eval", "quant_kernels",
)  # fmt: skip
"""What stands between a model's files and an answer."""
STANDS_ON = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "llama_cpp_python", "cyllama")
TOLD = {"report.json", "report.html", "recipe.yaml", "README.md"}
"""Files that say something of a model, and are not part of it."""


def default_folder() -> Path:
    """`netsuke/scores` in the user's folder for caches, as the XDG Base Directory Specification says where that is."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = named if named.is_absolute() else Path(os.path.expanduser("~/.cache"))
    if not folder.is_absolute():
        raise RequestError("there is no home folder to keep scores in; give --cache DIR or --no-cache")
    return folder / "netsuke" / "scores"


class ScoreCache:
    """A folder of journals; without a folder, nothing is kept. Raises RequestError where it cannot be written to.

    `tell` is called with each file that has to be read for its hash.
    """

    def __init__(self, folder: Path | None, tell: Callable[[Path], None] = lambda _: None) -> None:
        with eval_package():
            from eval.journal import Journal
        self.folder = folder
        self.tell = tell
        self.journals: dict[str, list[Journal]] = {}
        """By what they hold."""
        self._files = Journal()
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                self._files = Journal(folder / "files")
        except OSError as error:
            reason = error.strerror or error
            raise RequestError(
                f"--cache {folder}: scores cannot be kept there ({reason}). Name another folder, or give --no-cache"
            ) from error

    def journal(self, kind: str, *models: Path) -> Journal:
        """The measurements of one kind of these models."""
        with eval_package():
            from eval.journal import Journal, digest
        if self.folder is None:
            return Journal()
        name = digest(_program(), json.dumps([kind, *map(self._identity, models)]))
        found = Journal(self.folder / f"{kind}-{name[:32]}")
        self.journals.setdefault(kind, []).append(found)
        return found

    def summary(self) -> dict[str, Any] | None:
        """Where measurements are kept, and how many of those asked for were there; None where none are kept."""
        if self.folder is None:
            return None
        told: dict[str, Any] = {
            kind: {"asked": sum(each.asked for each in journals), "found": sum(each.found for each in journals)}
            for kind, journals in self.journals.items()
        }
        return {"folder": str(self.folder), **told}

    def _identity(self, model: Path) -> list[tuple[str, str]]:
        """Names and hashes of a model's files; a file's hash is known by its place, size and times."""
        found = [model] if model.is_file() else [*model.iterdir(), *(model / ADAPTER).glob("*")]
        files = sorted(file for file in found if file.is_file() and file.name not in TOLD and file.name[0] != ".")
        return [(file.relative_to(model).as_posix(), self._hash(file)) for file in files]

    def _hash(self, file: Path) -> str:
        state = file.stat()
        key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
        if (known := self._files.get(key)) is None:
            self.tell(file)
            with file.open("rb") as stream:
                known = hashlib.file_digest(stream, "sha256").hexdigest()
            self._files.put(key, known)
        return known


@cache
def _program() -> str:
    """A hash of these packages' files, and of the versions of others."""
    digest = hashlib.sha256()
    for part in PROGRAM:
        found = (ROOT / part).rglob("*") if (ROOT / part).is_dir() else [ROOT / part]
        for file in sorted(file for file in found if file.is_file() and file.suffix not in {".md", ".pyc"}):
            digest.update(
                f"{file.relative_to(ROOT).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode()
            )
    for name in STANDS_ON:
        try:
            digest.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            digest.update(f"{name} is not here".encode())
    return digest.hexdigest()
