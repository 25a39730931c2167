"""What something was made from: recorded when it is made, compared before it is used again or made anew.

Values (settings, labels, a plan) are recorded as they are, checkpoints and denoisers by content, the files of cases by
size and time: of thousands of scans nothing is read. Records are sealed: they notice when they were edited.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape, naming_full_disk, read_json, write_json

SEAL, FORMAT = "digest", "format"

Cases = Mapping[str, str]  # case -> its files by size and time


def digest(content: Any) -> str:
    """Computes the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def made_from(values: Mapping[str, Any], cases: Mapping[str, Cases] | None = None) -> dict[str, dict[str, Any]]:
    """Records what something is made from, in plain values as they come back from JSON.

    Args:
        values: {name: plain value}; of a checkpoint or a denoiser its `sha256`.
        cases: {kind of case: {case: `size_and_time` of its files}}.
    """
    return json.loads(json.dumps({"values": values, "cases": cases or {}}))


def differs(known: Mapping[str, Any], now: Mapping[str, Any], growing: Sequence[str] = ()) -> list[str]:
    """Says what differs between two records of `made_from`; nothing if they are the same.

    Args:
        known: Recorded when it was made.
        now: Of what it would be made from.
        growing: Kinds of cases of which new ones are welcome.

    Returns:
        A line for each value and each kind of case.
    """
    lines = _different_values(known["values"], now["values"])
    for kind in {**known["cases"], **now["cases"]}:
        before, after = known["cases"].get(kind, {}), now["cases"].get(kind, {})
        found = {
            "missing": before.keys() - after.keys(),
            "new": set() if kind in growing else after.keys() - before.keys(),
            "changed": {case for case in before.keys() & after.keys() if before[case] != after[case]},
        }
        if any(found.values()):
            told = "; ".join(f"{how}: {some(names)}" for how, names in found.items() if names)
            lines.append(f"{kind} cases: {told}")
    return lines


def refuse_other(output: str, known: Mapping[str, Any], now: Mapping[str, Any], remedy: str, growing=()) -> None:
    """Refuses to use or go on with something that was made from something else.

    Args:
        output: What was made, for the message.
        known: As `differs` has it.
        now: As said.
        remedy: What the user can do beside undoing the change.
        growing: As said.

    Raises:
        UserError: Naming everything that differs.
    """
    if lines := differs(known, now, growing):
        raise UserError("\n  ".join([f"{output}: was made from something else: undo that, or {remedy}", *lines]))


def some(names: Iterable[str], most: int = 5) -> str:
    """Writes the first of some names, and how many there are more."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _different_values(known: Any, now: Any, key: str = "") -> list[str]:
    if known == now:
        return []
    if not (isinstance(known, dict) and isinstance(now, dict)):
        before, after = (repr(value) if len(repr(value)) < 200 else f"{value!r:.197}..." for value in (known, now))
        return [f"{key}: was {before}, now {after}"]
    lines = []
    for name in {**known, **now}:
        lines += _different_values(known.get(name), now.get(name), f"{key}.{name}" if key else name)
    return lines


# ---------------------------------------------------------------- files


def size_and_time(folder: str, case: str, endings: Iterable[str]) -> str:
    """Records the files of a case by size and time: enough to notice that one was written, and nothing is read.

    Raises:
        OSError: If one is not there.
    """
    stats = (os.stat(os.path.join(folder, case + ending)) for ending in endings)
    return " ".join(f"{stat.st_size}@{stat.st_mtime_ns}" for stat in stats)


def sha256(path: str) -> str:
    """Computes the SHA-256 of a file.

    Raises:
        OSError: If it cannot be read.
    """
    content = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            content.update(block)
    return content.hexdigest()


# ---------------------------------------------------------------- sealed files


def write_sealed(path: str, content: Mapping[str, Any], version: int) -> None:
    """Writes plain values as JSON, whole or not at all, with their format and their digest."""
    content = {FORMAT: version, **content}
    write_json(path, {**content, SEAL: digest(content)})


def read_sealed(path: str, schema: Any, version: int, remedy: str) -> dict[str, Any] | None:
    """Reads what `write_sealed` wrote.

    Args:
        path: The file.
        schema: What it must hold; see `files.read_json`.
        version: The format that is written now.
        remedy: What the user can do instead of restoring the file.

    Returns:
        Its content; None if there is no such file.

    Raises:
        UserError: If it was written by another version, was edited, cut, or holds something else.
    """
    if not os.path.exists(path):
        return None
    content = read_json(path, dict[str, Any], f"restore it, or {remedy}")
    if (found := content.pop(FORMAT, None)) != version:
        raise UserError(
            f"{path}: has format {found}, this version writes {version}: finish with that version, or {remedy}"
        )
    if content.pop(SEAL, None) != digest({FORMAT: version, **content}):
        raise UserError(f"{path}: was edited, its digest does not fit: restore it, or {remedy}")
    check_shape(content, schema, path, f"restore it, or {remedy}")
    return content


class Journal:
    """Results of single cases: lines of JSON, appended one by one; a line that a kill cut counts for nothing.

    Attributes:
        entries: {case: plain value}.
    """

    def __init__(self, path: str, origin: Mapping[str, Any]):
        """Reads what is there, and starts over if it was made from something else.

        Args:
            path: The file; its folder is created.
            origin: Of `made_from`.

        Raises:
            NotWritten: If the disk is full.
        """
        self.path = path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lines = _whole_lines(path)
        if not lines or lines[0] != ["made from", digest(origin)]:
            lines = [["made from", digest(origin)]]
            with naming_full_disk(path), open(path, "w", encoding="utf-8") as f:
                f.write(json.dumps(lines[0]) + "\n")
        self.entries: dict[str, Any] = dict(lines[1:])

    def add(self, case: str, entry: Any) -> None:
        """Appends the result of a case.

        Raises:
            NotWritten: If the disk is full.
        """
        with naming_full_disk(self.path), open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps([case, entry]) + "\n")
        self.entries[case] = entry

    def seal(self) -> str:
        """Computes the SHA-256 of the file, for `read_journal`."""
        return sha256(self.path)


def read_journal(path: str, seal: str, schema: Any, remedy: str) -> dict[str, Any]:
    """Reads the entries of a journal that is complete.

    Raises:
        UserError: If it is not there, is not the one that was sealed, or holds something else.
    """
    if not os.path.isfile(path) or sha256(path) != seal:
        raise UserError(f"{path}: is missing, was edited or cut: restore it, or {remedy}")
    entries = dict(_whole_lines(path)[1:])
    check_shape(entries, dict[str, schema], path, f"restore it, or {remedy}")
    return entries


def _whole_lines(path: str) -> list[list]:
    """Reads the lines [text, value] of a journal, which is cut after the last whole one."""
    lines, whole = read_lines(path)
    if os.path.isfile(path) and whole < os.path.getsize(path):
        os.truncate(path, whole)
    return lines


def read_lines(path: str) -> tuple[list[list], int]:
    """Reads the whole lines [text, value] of a journal, which another process may be writing; none if there is no file.

    Returns:
        The lines; how many bytes they are.
    """
    lines, whole = [], 0
    if not os.path.isfile(path):
        return lines, whole
    with open(path, "rb") as f:
        for line in f:
            try:
                case, entry = json.loads(line) if line.endswith(b"\n") else ()
            except (ValueError, TypeError):
                break
            lines.append([case, entry])
            whole += len(line)
    return lines, whole
