"""Every exception netsuke raises on purpose.

```
NetsukeError                 catch this one to catch all of them
├── RequestError             the request is wrong, nothing was written; lists every problem   exit code 2
│   ├── RecipeError          a key, a value, a selector or a combination
│   ├── ModelError           the model folder cannot be read, or is not what it says it is
│   ├── DataError            the calibration or evaluation text cannot be used
│   └── OutputError          the output folder is in the way, or holds another run
└── RunError                 it failed on the way; what was finished is kept      exit code 1
    ├── NumericalError       a statistic or a result is not a finite number
    ├── StorageError         the disk is full or refuses to write
    └── VerificationError    the reloaded checkpoint does not compute what was computed
```
A message says what, where, the values, and the fix.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class NetsukeError(Exception):
    """The root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 1


class RequestError(NetsukeError):
    """The request cannot be carried out as it stands, for one or more reasons; nothing was written."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class RecipeError(RequestError):
    """What is wrong with a recipe, or with how it meets the model, all of it at once."""


class ModelError(RequestError):
    """The model folder is missing, incomplete or inconsistent."""


class DataError(RequestError):
    """The text cannot be found, read or used."""


class OutputError(RequestError):
    """The output folder exists already, or belongs to another run."""


class RunError(NetsukeError):
    """The run failed on the way; finished blocks are kept and `--resume` continues."""


class NumericalError(RunError):
    """A statistic, a weight or a result is NaN, infinite or empty."""


class StorageError(RunError):
    """Writing failed, most often because the disk is full."""


class VerificationError(RunError):
    """The checkpoint, reloaded from disk, does not compute what the run computed."""


def first_line(error: Exception) -> str:
    """What another program's error says first; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def naming(*layers: str) -> Iterator[None]:
    """Lets a NumericalError of a pure function say which layers it is about."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{', '.join(layers)}: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES}:
            raise
        raise StorageError(
            f"{path}: cannot write: {error.strerror}. Finished blocks are kept; "
            "make room and run the same command with --resume"
        ) from error


@contextmanager
def eval_package() -> Iterator[None]:
    """Import from netsuke's `eval` inside this; a user's own eval.py that stands in its way is named."""
    try:
        yield
    except ModuleNotFoundError as error:
        shadow = getattr(sys.modules.get("eval"), "__file__", None)
        if not (error.name or "").startswith("eval") or shadow is None:
            raise
        raise RequestError(
            f"{shadow}: shadows netsuke's package 'eval'. Rename it, or run `netsuke` from another folder"
        ) from error
