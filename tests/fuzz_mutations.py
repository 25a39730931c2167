"""What an editor, a kill, a bad disk or an attacker makes of a file, or a hurried user of a command line."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ["..", ".", "", "../../../climbed", "ABSOLUTE", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\ud800", "n" * 5000,
         ".hidden", "gt_segmentations", "-rf", "{fold}", "%s", " "]  # fmt: skip
VALUES = [None, True, 0, -1, 5, 1.5, 10**30, "text", "", [], {}, [[]], ["text"], {"a": {"b": 1}}, [None], {"": None},
          [1, 2, 3], float("nan"), float("inf"), -float("inf")]  # fmt: skip
WHOLE = ("cut", "noise", "nested", "empty", "pickle")  # nothing of such a file can be used
KINDS = ("cut", "noise", "nested", "whole", *("value",) * 6, *("removed",) * 3, *("name",) * 4, *("key",) * 2)
PATHS = ("-o", "--root")  # of arguments: anything that a user gives there is meant
POSITIONAL = {"train": ("fold", "configuration")}  # by which name a message may call an argument without an option
NUMBERS = ["-1", "0", "nan", "inf", "1e400", "x", "", "99999999999999999999", "1.5", "-0"]


class Harmful:
    """Unpickled, it makes a folder: where code runs, that folder is there afterwards."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def places(content: Any) -> list[tuple]:
    """The paths of all values in plain values, the whole first."""
    found, todo = [()], [((), content)]
    while todo:
        path, value = todo.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            found.append((*path, key))
            todo.append(((*path, key), inner))
    return found


def a_place(content: Any, rng: random.Random) -> tuple:
    """One of them; those near the top, which mean most, as often as those of a long table."""
    every = places(content)[1:]
    depth = rng.choice(sorted({len(path) for path in every})) if every else 0
    return rng.choice([path for path in every if len(path) == depth]) if every else ()


def changed(content: Any, path: tuple, change: Callable[[Any, Any], None]) -> None:
    """Applies `change(parent, key)` at a path."""
    for key in path[:-1]:
        content = content[key]
    change(content, path[-1])


def spoiled_json(text: str, rng: random.Random, absolute: Path) -> tuple[str, bytes, list[str]]:
    """A kind of damage, the file with it, and words of which one names the culprit, apart from the file."""
    content = json.loads(text)
    kind = rng.choice(KINDS)
    if kind == "cut":
        return kind, text.strip().encode()[: rng.randrange(len(text.strip()) - 1)], []
    if kind == "noise":
        return kind, rng.randbytes(rng.randrange(1, 400)), []
    if kind == "nested":
        return kind, b"[" * 100_000, []
    if kind == "whole":
        value = rng.choice(VALUES)
        return f"whole={short(value)}", json.dumps(value).encode(), []
    path = a_place(content, rng)
    if not path:
        return "whole=[]", b"[]", []
    words = [str(key) for key in path if isinstance(key, str)]
    if kind == "value":
        value = rng.choice(VALUES)
        changed(content, path, lambda parent, key: parent.__setitem__(key, value))
        return f"{dotted(path)}={short(value)}", json.dumps(content).encode(), words
    if kind == "removed":
        changed(content, path, lambda parent, key: parent.pop(key))
        return f"{dotted(path)} removed", json.dumps(content).encode(), words
    name = rng.choice(NAMES).replace("ABSOLUTE", str(absolute))
    if kind == "name":
        texts = [path for path in places(content) if path and isinstance(at(content, path), str)]
        path = rng.choice(texts) if texts else path
        changed(content, path, lambda parent, key: parent.__setitem__(key, name))
        return f"{dotted(path)}={short(name)}", json.dumps(content).encode(), [str(k) for k in path]
    keys = [path for path in places(content) if path and isinstance(path[-1], str)]
    if not keys:
        return "whole={}", b"{}", []
    path = rng.choice(keys)
    changed(content, path, lambda parent, key: parent.__setitem__(name, parent.pop(key)))
    return f"key {dotted(path)} renamed {short(name)}", json.dumps(content).encode(), [*map(str, path)]


def spoiled_binary(path: Path, rng: random.Random, evil: Path) -> tuple[str, bytes, list[str]]:
    """The same for a file that is no text."""
    content = path.read_bytes()
    kind = rng.choice(["cut", "noise", "flipped", "empty", *["pickle"] * 3 * (path.suffix in (".pth", ".pkl"))])
    if kind == "cut":
        content = content[: rng.randrange(1, len(content))]
    if kind == "noise":
        content = rng.randbytes(rng.randrange(1, 2000))
    if kind == "flipped":
        start = rng.randrange(len(content))
        content = content[:start] + rng.randbytes(min(64, len(content) - start)) + content[start + 64 :]
    if kind == "empty":
        content = b""
    if kind == "pickle":
        content = harmful(path, evil, rng.random() < 0.5)
    return kind, content, []


def harmful(path: Path, evil: Path, is_archive: bool) -> bytes:
    """A file that runs code when it is unpickled: a pickle, or an archive of torch's with the right keys."""
    if path.suffix == ".pkl" or not is_archive:
        return pickle.dumps({"network_weights": Harmful(evil)})
    import io

    import torch

    file = io.BytesIO()
    try:
        known = torch.load(path, map_location="cpu", weights_only=False)
    except Exception:
        known = {}
    torch.save({**known, "optimizer_state": Harmful(evil), "logging": Harmful(evil)}, file)
    return file.getvalue()


def spoiled_arguments(argv: list[str], rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A command line with one argument of which the value is nonsense, and words that name it."""
    places = [i for i in range(1, len(argv)) if not argv[i].startswith("-")]
    place = rng.choice(places)
    option = next((a for a in reversed(argv[:place]) if a.startswith("-")), argv[0])
    value = rng.choice(NUMBERS if option in PATHS else NUMBERS + NAMES)
    words = [option, value or "''", short(value), argv[place], *POSITIONAL.get(argv[0], ())]
    return f"{option} {short(value)}", [*argv[:place], value, *argv[place + 1 :]], words


def at(content: Any, path: tuple) -> Any:
    """The value at a path."""
    for key in path:
        content = content[key]
    return content


def dotted(path: tuple) -> str:
    """A path as text."""
    return short(".".join(map(str, path)))


def short(value: Any) -> str:
    """A value as text of one line."""
    text = ascii(value).strip("'")
    return text if len(text) <= 60 else text[:57] + "..."
