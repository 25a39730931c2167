"""A warm command is as a fresh one: what it is given, what it gives back, and when it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from running import PYTHON, run_command

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only on Linux")]
GIVEN = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ["SAID"], sys.stdin.read(), __name__, os.getppid(), sys.path[0]]))
"""
SPAWN = """
import multiprocessing, os
def square(number):
    return number**2
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(square, range(4)))
"""


@pytest.mark.parametrize("kind", ["code", "script", "module"])
def test_it_is_given_the_same(kind, tmp_path, monkeypatch):
    (tmp_path / "given.py").write_text(GIVEN)
    monkeypatch.setenv("SAID", "it's")
    arguments = {"code": ["-c", GIVEN], "script": ["given.py"], "module": ["-m", "given"]}[kind]
    options = {"cwd": tmp_path, "input": "words", "capture_output": True, "text": True, "check": True}
    fresh, warm = (subprocess.run([python, *arguments, "a b"], **options).stdout for python in (PYTHON, sys.executable))
    assert json.loads(warm) == json.loads(fresh) and json.loads(warm)[5] == os.getpid()


@pytest.mark.parametrize(
    "code", ["", "raise SystemExit(3)", "raise SystemExit('word')", "1 / 0", "import os; os.kill(os.getpid(), 9)"]
)
def test_it_ends_the_same(code):
    fresh, warm = (run_command([python, "-c", code]) for python in (PYTHON, sys.executable))
    assert warm.returncode == fresh.returncode
    assert warm.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_it_has_imported_what_is_not_ours_unless_its_environment_decides_over_that(monkeypatch):
    code = "import sys; print('torch' in sys.modules, 'nnunet_diffusion' in sys.modules)"
    assert run_command([sys.executable, "-c", code]).stdout == "True False\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run_command([sys.executable, "-c", code]).stdout == "False False\n"


def test_no_two_draw_the_same():
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    one, two = (run_command([sys.executable, "-c", code]).stdout.split() for _ in range(2))
    assert not set(one) & set(two)


def test_it_spawns_workers(tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    assert run_command([sys.executable, str(tmp_path / "spawn.py")]).stdout == "[0, 1, 4, 9]\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_gone_when_it_is_stopped(number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.send_signal(number)
    assert process.returncode == -number
    for _ in range(200):
        if not os.path.exists(f"/proc/{child}"):
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} goes on")
