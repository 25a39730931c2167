"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nnunet_diffusion.errors import UserError


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[str]:
    """Yields the name of a temporary file beside `path`, which becomes `path` when the block ends without an error.

    The temporary name ends like `path`, because image writers choose the format by it.

    Raises:
        OSError: If the folder cannot be written to, or the disk is full; `path` is then what it was.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".tmp{os.getpid()}_{name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def read_json(path: str | os.PathLike, remedy: str = "correct it") -> Any:
    """The content of a JSON file that a person may have edited.

    Raises:
        UserError: If it is not JSON; with what to do.
        OSError: If it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}): {remedy}") from error


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")
