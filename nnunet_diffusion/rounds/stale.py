"""Temporary files (`nnunet_diffusion.files.atomic`) that killed writers left."""

import glob
import os
import re
import time
from contextlib import suppress

HOUR_S, DAY_S = 3600, 86400


def remove_stale(folder: str, is_ours_alone: bool = False) -> None:
    """Removes the temporary files that killed writers left in a folder and below.

    Parts write beside this process, on other machines too, whose processes cannot be seen from here, but none of them
    for long. So a file goes when nobody wrote to it for an hour and this machine has no such process, or for a day, by
    when the number may be another process's.

    Args:
        folder: Of a run; others have no such names.
        is_ours_alone: Nobody but this process writes there: all of them go.
    """
    for path in glob.glob(os.path.join(glob.escape(folder), "**", ".tmp[0-9]*_*"), recursive=True):
        number = re.match(r"\.tmp(\d+)_", os.path.basename(path))
        with suppress(FileNotFoundError):  # its writer ended just now
            quiet_s = time.time() - os.path.getmtime(path)
            is_dead = quiet_s > DAY_S or (quiet_s > HOUR_S and number and not _is_running(int(number[1])))
            if number and os.path.isfile(path) and (is_ours_alone or is_dead):
                os.remove(path)


def _is_running(process: int) -> bool:
    """Says whether this machine has a process of that number; where it cannot be asked, on Windows, as if it had."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
