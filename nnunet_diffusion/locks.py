"""Locks: commands that write into the same folder take turns, or are refused by name."""

import contextlib
import errno
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator

from nnunet_diffusion.errors import UserError

PATIENCE_S = 20.0  # a command of a killed run may need as long to notice
IS_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # flock says these where it works, the last on NFS


@contextlib.contextmanager
def locked(
    path: str, what: str, is_shared: bool = False, patience_s: float | None = None, is_optional: bool = False
) -> Iterator[int]:
    """Lets one command at a time work on something; yields the lock's file, which its commands should inherit.

    The system releases a lock when the last process that has its file open ends, however it ends. So a command of a
    killed run is waited for.

    Args:
        path: Of the lock, a file that stays; its folder is created.
        what: Is worked on, for the message, such as "the folder X".
        is_shared: Several commands that all say so may work at the same time, such as parts of one work.
        patience_s: How long another command is waited for; `PATIENCE_S` if it is not given.
        is_optional: Goes on without a lock where the file system knows none.

    Raises:
        UserError: If another command holds it for longer, with what it is; or if the file system knows no locks.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl
    except ImportError:  # not on Windows: the user must see to it
        fcntl = None
    try:
        until = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        while fcntl:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in IS_HELD and is_optional:
                    break
                if error.errno not in IS_HELD:
                    raise UserError(
                        f"{path}: its file system has no locks ({error.strerror}), so that two commands could spoil "
                        "each other's work: mount it with locks, or take a folder on another one"
                    ) from error
                if time.monotonic() > until:
                    raise UserError(
                        f"{path}: another command works on {what} ({_holder(file)}): wait for it or end it"
                    ) from error
                time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk: nobody is told who holds the lock, that is all
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_this_command()).encode(), 0)
        yield file
    finally:
        os.close(file)


def _this_command() -> dict[str, str | int]:
    command = shlex.join([os.path.basename(sys.argv[0] or "python"), *sys.argv[1:]])
    return {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%F %T"), "command": command}


def _holder(file: int) -> str:
    try:
        told = json.loads(os.pread(file, 1 << 16, 0))
        return f"process {told['process']} on {told['machine']} since {told['since']}: {told['command']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "it has not said which"
