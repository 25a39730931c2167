"""Files and folders that are written whole or not at all."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nnunet_diffusion.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# On a full disk torch.save and SimpleITK raise RuntimeErrors; torch's say that its archive is shorter than it must be.
NO_ROOM_SAID = re.compile(
    "unexpected pos|iostream error|file write failed|PytorchStreamWriter failed|No space left|couldn't write"
)


class NotWritten(OSError):
    """A file that could not be written; its message says what to do."""


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[str]:
    """Yields the name of a temporary file beside `path`, which becomes `path` when the block ends without an error.

    The temporary name ends like `path`, because image writers choose the format by it.

    Raises:
        OSError: If the folder cannot be written to; `path` is then what it was.
        NotWritten: If the disk is full; the same.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".tmp{os.getpid()}_{name}")
    try:
        with naming_full_disk(path):
            yield temporary
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[str]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends without an error.

    Raises:
        UserError: If there is something at `path`, before the block or after.
        OSError: If it cannot be made; `path` is then not there.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: remove it, or give another folder")
    parent, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(parent, f".tmp{os.getpid()}_{name}")
    os.makedirs(temporary)
    try:
        yield temporary
        try:
            os.rename(temporary, os.path.join(parent, name))
        except OSError as error:
            raise UserError(f"{path} was made meanwhile by another command ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def naming_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """Lets the errors of a full disk say which file could not be written, and what to do.

    Raises:
        NotWritten: Instead of what the writer raised.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if getattr(error, "errno", None) in NO_ROOM or NO_ROOM_SAID.search(str(error)):
            folder, name = os.path.split(os.path.abspath(path))
            raise not_written(name, folder, error) from error
        raise


def not_written(what: str, folder: str, error: RuntimeError | OSError) -> NotWritten:
    """Makes the error that says how much room there is: of a full disk blosc2 says no more than that it failed."""
    if isinstance(error, NotWritten):
        return NotWritten(*error.args)
    free = shutil.disk_usage(folder).free / 1e6
    said = getattr(error, "strerror", None) or error  # without the name of the temporary file
    return NotWritten(
        f"{what} was not written to {folder}, where {free:.0f} MB are free: {said}; make room if that is too little, "
        "then run the same command again"
    )


def read_json(path: str | os.PathLike, schema: Any = None, remedy: str = "correct it") -> Any:
    """Reads a JSON file, which a person may have edited or a kill may have cut.

    Args:
        path: The file.
        schema: What it must hold, of `nnunet_diffusion.schemas`; None: anything, NaN and infinity included.
        remedy: What the user can do: for files that a command makes, which one makes them anew.

    Raises:
        UserError: If it is no JSON or does not have that shape; names the file, the key, what came, what is expected.
        OSError: If it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({error}): {remedy}") from error
    if schema is not None:
        check_shape(content, schema, str(path), remedy)
    return content


def check_shape(content: Any, schema: Any, where: str, remedy: str = "correct it") -> None:
    """Raises UserError, beginning with `where`, if plain values do not have the shape of a schema; see `read_json`."""
    from nnunet_diffusion.schemas import first_problem  # pydantic takes 0.15 s to import

    if problem := first_problem(content, schema):
        raise UserError(f"{where}: {problem}: {remedy}")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")
