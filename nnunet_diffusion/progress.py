"""How far a work on many cases is, from what is on the disk: nothing is asked, and nothing is changed."""

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

RECENT = 200  # cases by which the rate is measured


@dataclass(frozen=True)
class Progress:
    """Of one work on many cases."""

    what: str
    done: int
    failed: dict[str, str]  # case -> why
    left: int  # neither
    per_hour: float | None  # of the last RECENT cases; None if there are fewer than two
    idle_s: float | None  # since the last one; None if there is none

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return asdict(self)

    def told(self, most: int = 5) -> str:
        """Says it in a line, and names the first of what failed."""
        rate = "" if self.per_hour is None else f", {self.per_hour:.0f} an hour, the last {self.idle_s:.0f} s ago"
        lines = [f"{self.what}: {self.done} done, {len(self.failed)} failed, {self.left} left{rate}"]
        lines += [f"  {case}: {why}" for case, why in sorted(self.failed.items())[:most]]
        return "\n".join(lines + ["  ..."] * (len(self.failed) > most))


def progress(what: str, cases: Collection[str], folder: str, ending: str, failed: Mapping[str, str]) -> Progress:
    """Looks at how far a folder is.

    Args:
        what: Is done.
        cases: That are to be done.
        folder: Has `<case><ending>` of those that are.
        ending: The last file of a case to appear.
        failed: Why others are not; a case that was done since counts as done.
    """
    written = times_of(folder, ending)
    done = [written[case] for case in cases if case in written]
    lacking = {case: failed[case] for case in cases if case in failed and case not in written}
    return Progress(what, len(done), lacking, len(cases) - len(done) - len(lacking), *rate(done))


def times_of(folder: str, ending: str) -> dict[str, float]:
    """Returns when each case's file was written; nothing if there is no such folder."""
    if not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {e.name.removesuffix(ending): e.stat().st_mtime for e in entries if e.name.endswith(ending)}


def rate(times: Collection[float]) -> tuple[float | None, float | None]:
    """Computes how many an hour there were lately, and the seconds since the last."""
    last = sorted(times)[-RECENT:]
    if not last:
        return None, None
    took = last[-1] - last[0]
    return (len(last) - 1) / took * 3600 if took > 0 else None, max(0.0, time.time() - last[-1])
