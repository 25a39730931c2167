"""The runner of many cases: in processes of this machine and on a Dask cluster of real processes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from running import PYTHON, run_command

from nnunet_diffusion import workers
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.workers import HERE, Workers, work_on


def square(number):
    return number * number


def where(_):
    time.sleep(0.02)
    return os.getpid(), workers.worker_number


def fail_at_two(number):
    if number == 2:
        raise UserError("two is no number")
    return number


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def fail_oddly(_):
    raise Unpicklable


def die_if_new(folder, case, times):
    """Ends its process, so many times for a case, as the system does to one that has taken too much memory."""
    before = len(list(Path(folder).glob(f"{case}.*")))
    if before < times:
        Path(folder, f"{case}.{before}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return case


def eat(megabytes):
    """Takes memory, and keeps it for long enough to be seen."""
    taken = []
    for _ in range(megabytes // 100):
        taken.append(bytearray(os.urandom(1) * 100_000_000))
        time.sleep(0.05)
    time.sleep(5 if taken else 0)
    return megabytes


def meet(folder, name, others):
    """Returns when so many others are in it at the same time."""
    Path(folder, name).touch()
    until = time.monotonic() + 20
    while len(os.listdir(folder)) < others:
        assert time.monotonic() < until, "the others never came"
        time.sleep(0.01)
    return os.getpid(), threading.get_ident()


TASKS = {f"case {number}": (number,) for number in range(7)}
SQUARES = {f"case {number}": number * number for number in range(7)}


@pytest.mark.parametrize("here", [HERE, Workers(2), Workers(2, at_once=2), Workers(9)])
def test_each_case_is_worked_on_once_wherever_that_is(here):
    done = list(work_on(square, TASKS, here, "squaring"))
    assert len(done) == 7 and dict(done) == SQUARES
    assert list(work_on(square, {}, here, "nothing")) == []


def test_one_process_is_this_one_and_more_are_others_with_numbers_of_their_own():
    assert {process for _, (process, _) in work_on(where, TASKS, HERE, "here")} == {os.getpid()}
    found = {result for _, result in work_on(where, dict.fromkeys(map(str, range(200)), (0,)), Workers(2), "there")}
    assert len(found) == 2 and {number for _, number in found} == {0, 1} and os.getpid() not in dict(found)
    apart = {process for _, (process, _) in work_on(where, TASKS, Workers(1, at_once=2), "apart")}
    assert len(apart) == 1 and os.getpid() not in apart


def test_a_process_works_on_as_many_cases_at_once_as_it_is_told(tmp_path):
    tasks = {name: (str(tmp_path), name, 3) for name in "abc"}
    found = {result for _, result in work_on(meet, tasks, Workers(1, at_once=3), "meeting")}
    assert len({process for process, _ in found}) == 1 and len(found) == 3


def test_the_first_error_ends_it_with_what_was_raised():
    for here in (HERE, Workers(2)):
        with pytest.raises(UserError, match="two is no number"):
            list(work_on(fail_at_two, TASKS, here, "failing"))
    with pytest.raises(RuntimeError, match="Unpicklable"):
        list(work_on(fail_oddly, TASKS, Workers(2), "failing"))


def test_a_worker_that_is_killed_names_its_case_which_is_tried_once_alone_then_listed(tmp_path, capsys):
    tasks = {case: (str(tmp_path), case, times) for case, times in (("a", 0), ("b", 1), ("c", 9), ("d", 0))}
    killed = {}
    done = dict(work_on(die_if_new, tasks, Workers(2), "dying", killed))
    assert sorted(done) == ["a", "b", "d"] and list(killed) == ["c"]
    assert "also when it worked on nothing else (signal SIGKILL)" in killed["c"]
    assert len(list(tmp_path.glob("c.*"))) == 2
    said = capsys.readouterr().out
    assert "b: its worker died (signal SIGKILL): tried again alone" in said and "a: " not in said
    with pytest.raises(UserError, match="(?s)dying: everything else is done, but not\n  c: its worker died"):
        list(work_on(die_if_new, tasks, Workers(2), "dying"))


def test_dask_is_imported_for_a_scheduler_alone():
    code = (
        "import sys; from nnunet_diffusion import workers; done = workers.work_on(abs, {'a': (-1,)}, workers.HERE, '')"
    )
    code += "; print(list(done), {'dask', 'distributed'} & {name.split('.')[0] for name in sys.modules})"
    assert run_command([PYTHON, "-c", code]).stdout == "[('a', 1)] set()\n"


def test_dask_that_is_not_installed_is_named(monkeypatch):
    workers.connected.cache_clear()
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"--scheduler needs Dask .*: pip install 'nnunet_diffusion\[cluster\]'"):
        list(work_on(square, TASKS, Workers(1, "slurm"), "nowhere"))


def test_a_worker_that_cannot_start_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(workers, "_serve", os._exit)
    with pytest.raises(UserError, match="a worker process could not start"):
        list(work_on(square, TASKS, Workers(2), "never"))
