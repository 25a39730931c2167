"""Commands that tests run: none outlives its test, and one that hangs says where."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

PYTHON = sys.executable  # a process of its own from the start; slow tests set sys.executable to the warm one


def run_command(command: list, timeout: float = 600, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Runs a command in a session of its own, with its output in files, which a process left behind cannot hold up.

    When time is up, Python's processes print where each of their threads is, and all are killed.

    Args:
        command: What to run.
        timeout: In seconds.
        env: Environment, by default this process's.
        **options: Of `subprocess.Popen`.

    Raises:
        TimeoutError: With the end of what the command printed.
    """
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def printed() -> tuple[str, str]:
            for stream in (out, err):
                stream.seek(0)
            return out.read(), err.read()

        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True, **options)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(2)
            ends = "\n".join(text[-6000:] for text in printed())
            raise TimeoutError(f"{command} did not end within {timeout} s\n{ends}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return subprocess.CompletedProcess(command, code, *printed())


def killable(*arguments: object) -> list[str]:
    """Our command line in a process that a test can kill at once; the commands that it starts in turn are warm."""
    code = "import sys; sys.executable = sys.argv.pop(1)\nfrom nnunet_diffusion.cli import main; sys.exit(main())"
    return [PYTHON, "-c", code, sys.executable, *map(str, arguments)]
