"""What a run of rounds has done so far: one JSON, written whole or not at all, that notices when it was edited.

What the run depends on is recorded by content: when a scan, an annotation, the plan, a setting or a checkpoint is no
longer what it was, the run stops and names it. New cases are no change: they join the next round.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json

FORMAT = 1
START_ANEW = "or remove the folder {folder} to start anew"

Record = dict[str, Any]  # of one file: bytes, mtime_ns, sha256


def digest(content: Any) -> str:
    """The SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record(path: str, known: Record | None = None) -> Record:
    """Size, time and SHA-256 of a file; it is read only if it is not the one that is `known` by size and time."""
    stat = os.stat(path)
    if known and (known["bytes"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return known
    with open(path, "rb") as f:
        content = hashlib.file_digest(f, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read())
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": content.hexdigest()}


def load_state(path: str) -> dict[str, Any] | None:
    """The state of a run; None if it has not begun.

    Raises:
        UserError: If the file is truncated, edited or of another version.
    """
    if not os.path.exists(path):
        return None
    anew = START_ANEW.format(folder=os.path.dirname(path))
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is truncated or no state of rounds ({error!r}): restore it, {anew}") from error
    if found != FORMAT:
        raise UserError(f"{path}: has format {found}, this version writes {FORMAT}: finish with that version, {anew}")
    if content.pop("digest", None) != digest(content):
        raise UserError(f"{path}: was edited, its digest does not fit: restore it, {anew}")
    return content


def save_state(path: str, content: Mapping[str, Any]) -> None:
    """Writes the state, whole or not at all."""
    write_json(path, {**content, "digest": digest(content)})


def refuse_changes(path: str, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares what a run was started with and what it is continued with.

    Args:
        path: Of the state, for the message.
        known: {name: value}, as recorded.
        now: The same names.

    Raises:
        UserError: Naming what differs.
    """
    changed = [f"{name}: was {known[name]!r}, now {now[name]!r}" for name in known if known[name] != now.get(name)]
    if changed:
        anew = START_ANEW.format(folder=os.path.dirname(path))
        raise UserError("\n  ".join([f"{path}: this run was started with something else: undo it, {anew}", *changed]))


def refuse_changed_cases(path: str, what: str, known: Mapping[str, dict], now: Mapping[str, dict], moved=()) -> None:
    """Compares the files of cases by content; new cases are welcome.

    Args:
        path: Of the state, for the message.
        what: The kind of case.
        known: {case: {file ending: record}}.
        now: The same.
        moved: Cases that may be missing, as they are of another kind now.

    Raises:
        UserError: Naming the cases that changed or are missing.
    """
    missing = sorted(set(known) - set(now) - set(moved))
    changed = sorted(case for case in known.keys() & now.keys() if _contents(known[case]) != _contents(now[case]))
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"changed: {', '.join(changed)}"] * bool(changed)
    if problems:
        anew = START_ANEW.format(folder=os.path.dirname(path))
        raise UserError(
            f"{what} cases are not what this run was started with ({'; '.join(problems)}): restore them, {anew}"
        )


def _contents(files: Mapping[str, Record]) -> dict[str, str]:
    return {ending: file["sha256"] for ending, file in files.items()}
