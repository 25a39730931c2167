"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


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


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")
