"""Marks: a folder that this program made says so, and what it is; nothing else is ever cleared or written into.

The mark is `.nnunet_diffusion/identity.json` in the folder; nnU-Net does not look into hidden folders. Temporary files
of the folder lie beside the mark.
"""

import os
import shutil
from typing import Any

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json, write_json

WORK = ".nnunet_diffusion"
MARK = "identity.json"


def mark(folder: str, /, **what: Any) -> None:
    """Marks a folder, which is created if need be, as made by this program.

    Args:
        folder: One that `refuse_foreign` lets pass.
        **what: Says what it is, in plain values, such as its data set; replaces what an earlier mark said.
    """
    if mark_of(folder) != what:
        os.makedirs(os.path.join(folder, WORK), exist_ok=True)
        write_json(os.path.join(folder, WORK, MARK), what)


def mark_of(folder: str) -> dict[str, Any] | None:
    """Reads what the mark of a folder says; None if it has none, {} if the mark is damaged."""
    try:
        said = read_json(os.path.join(folder, WORK, MARK))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError:
        return {}
    return said if isinstance(said, dict) else {}


def refuse_foreign(folder: str, /, **what: Any) -> None:
    """Refuses to work in a folder that this program did not make, or that is not what it should be.

    One that is not there, or holds nothing but what a killed command left of a mark, passes.

    Args:
        folder: The folder.
        **what: What its mark must say; what it says nothing about, as marks of earlier versions, passes.

    Raises:
        UserError: Naming the folder and what its mark says.
    """
    remedy = "move it away, or remove it yourself if nothing in it is needed"
    # listed before the mark is read: another command may just now mark it, and then write
    is_used = os.path.lexists(folder) and (not os.path.isdir(folder) or bool(set(os.listdir(folder)) - {WORK}))
    said = mark_of(folder)
    known = said or {}
    if said is None and is_used:
        raise UserError(f"{folder}: was not made by nnunet_diffusion, which does not touch it: {remedy}")
    if other := [f"{key} {known[key]!r}, not {what[key]!r}" for key in known.keys() & what if known[key] != what[key]]:
        raise UserError(f"{folder}: was made for {', '.join(other)}: {remedy}")


def remove_marked(folder: str, /, **what: Any) -> None:
    """Removes a folder that this program made, its mark last: killed in between, the rest can still be removed.

    Args:
        folder: One that is not there, either, is fine.
        **what: As `refuse_foreign` has it.

    Raises:
        UserError: If it is not this program's; nothing is removed then.
    """
    refuse_foreign(folder, **what)
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and entry.name != WORK:
                shutil.rmtree(entry.path)
            elif entry.name != WORK:
                os.remove(entry.path)
    shutil.rmtree(folder)
