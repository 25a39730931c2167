"""Folders of preprocessed cases, marked with what decides their values, and what takes their place when that changes.

The successor is made beside the folder, in a hidden one, and takes its place by renames when it is whole.
"""

import os
from contextlib import suppress
from os.path import basename, dirname, isdir, join

from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.marks import mark, mark_of, refuse_foreign, remove_marked


def differing(folder: str, identity: dict) -> list[str]:
    """Lists, by the folder's mark, what its cases were made with that is not of that identity."""
    said = mark_of(folder) or {}
    return sorted(key for key in identity if said.get(key) != identity[key])


def _beside(folder: str) -> tuple[str, str]:
    """Names where a folder's successor is made, and where the folder goes when that is whole; no plan can name them."""
    return tuple(join(dirname(folder), f".{kind}_{basename(folder)}") for kind in ("new", "old"))


def place_to_fill(folder: str, what: dict, identity: dict, configuration: str, is_part: bool) -> str:
    """Readies where cases of an identity are made: the folder, or one beside it if it holds those of another.

    Raises:
        UserError: If something is in the way that is not ours, or a part would have to begin beside the folder.
    """
    new, old = _beside(folder)
    for place in (folder, new, old):
        refuse_foreign(place, **what)
    if not is_part:
        _finish_replacing(folder, what)
    place = folder
    if mark_of(folder) is not None and (others := differing(folder, identity)):
        if is_part:
            raise UserError(f"{folder}: was made with another plan: run the command once without --num_parts")
        tqdm.write(f"{folder}: made with other {', '.join(others)}: done anew")
        place = new
    if not is_part and (place == folder or differing(new, identity)):
        remove_marked(new, **what)
    if differing(place, what | identity):
        with suppress(FileNotFoundError):  # a part on another machine, of the same number, wrote it just now
            mark(place, **what, configuration=configuration, **identity)
    return place


def replace(folder: str, what: dict) -> None:
    """Lets what was made beside a folder take its place."""
    new, old = _beside(folder)
    os.rename(folder, old)
    os.rename(new, folder)
    remove_marked(old, **what)


def _finish_replacing(folder: str, what: dict) -> None:
    """Puts the folder back after a kill between these renames; after one behind them removes what it was."""
    _, old = _beside(folder)
    if isdir(old) and not isdir(folder):
        os.rename(old, folder)
    remove_marked(old, **what)
