"""Names that come from files: checked by one function before they become paths."""

from typing import Any

from nnunet_diffusion.errors import UserError

MAX_BYTES = 200  # file systems allow 255, and endings, channel numbers and marks of temporary files are added


def safe_name(name: Any, where: str, remedy: str = "rename it") -> str:
    """Returns a name that stays within whichever folder it is joined to, as one file or folder there.

    Args:
        name: What a file says: a case, a data set, a plan, a configuration, a data identifier, a fold, a label.
        where: The file and the key that it stands at, for the message.
        remedy: What the user can do.

    Raises:
        UserError: If it is no text, empty, too long, no UTF-8, hidden (`.`, `..` and temporary files among them), or
            has a separator or a control character.
    """
    if reason := why_unsafe(name):
        shown = repr(name) if len(repr(name)) <= 100 else f"{name!r:.97}..."
        raise UserError(f"{where}: {shown} cannot be the name of a file or folder, it {reason}: {remedy}")
    return name


def why_unsafe(name: Any) -> str:
    """Says why a name must not become a path; empty if it may."""
    if not isinstance(name, str):
        return f"is no text but a {type(name).__name__}"
    if not name:
        return "is empty"
    if set(name) & set("/\\"):
        return "has a separator of paths"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "has a control character"
    if name.startswith("."):
        return "begins with a dot"
    try:
        if len(name.encode()) > MAX_BYTES:
            return f"is longer than {MAX_BYTES} bytes"
    except UnicodeEncodeError:
        return "is no UTF-8"
    return ""
