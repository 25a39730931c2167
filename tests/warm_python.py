"""Stands in for Python and for the commands of an installation: the warm server forks the process that they would be.

It lies under the names of those commands in a folder with the server's socket: see warm_server.py.
"""

import json
import os
import signal
import socket
import sys

folder, name = os.path.split(os.path.abspath(sys.argv[0]))
command = sys.argv[1:] if name == "python" else [os.path.join(os.path.dirname(sys.executable), name), *sys.argv[1:]]


def inherited() -> list[int]:
    """The open files that the caller passed on; those that this process opened itself are not inheritable."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            found += [number] * os.get_inheritable(number)
        except OSError:  # the listing's own
            continue
    return found


files = inherited()
request = {"command": command, "cwd": os.getcwd(), "environment": dict(os.environ), "files": files, "pid": os.getpid()}
with socket.socket(socket.AF_UNIX) as server, server.makefile("r") as answers:
    server.connect(os.path.join(folder, "socket"))
    socket.send_fds(server, [b"\n"], files)
    server.sendall(json.dumps(request).encode() + b"\n")
    child = int(answers.readline())
    if not child:  # its environment decides what the server's imports did
        os.execv(sys.executable, [sys.executable, *command])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGABRT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    for number in files:
        if number > 2:
            os.close(number)
    code = int(answers.readline())
if code < 0:  # a signal's number
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
