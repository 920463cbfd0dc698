"""
Does what `python SCRIPT ARGUMENTS` does, without the two seconds that importing PyTorch takes.

This process has imported it, and forks for each script that scripts.py asks for, by a line of JSON on
stdin: arguments (of Python: a script, or -m and a module, then the rest), cwd, environment, and folder,
where stdout, stderr, pid and finally exitcode go. A script ends as it does elsewhere: sys.excepthook,
atexit and the interpreter's own end take place.
"""
import contextlib
import gc
import json
import os
import runpy
import signal
import sys

import torch._dynamo  # noqa: F401  all of PyTorch, and what the first optimiser imports

CHILDREN = {signal.SIGCHLD}
folders = {}  # of the processes that run: {pid: folder}


def write(path, number):
    """The file is there when it is whole."""
    with open(f"{path}.partial", "w") as f:
        f.write(str(number))
    os.replace(f"{path}.partial", path)


def note_exit_codes(*_):
    """A signal's handler: the next signal may come at any line of it, and then all of it runs, inside, first."""
    with contextlib.suppress(ChildProcessError):  # no process is left
        while (child := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            write(f"{folders.pop(child[0])}/exitcode", os.waitstatus_to_exitcode(child[1]))


gc.collect()
gc.freeze()  # or each process would go through all of PyTorch's objects, and so copy them, when it ends
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, note_exit_codes)
for line in sys.stdin:
    request = json.loads(line)
    signal.pthread_sigmask(signal.SIG_BLOCK, CHILDREN)  # until we know whose end it is
    pid = os.fork()
    if not pid:
        break
    folders[pid] = request["folder"]
    write(f"{request['folder']}/pid", pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CHILDREN)
else:
    sys.exit()

# from here on, a process of a script
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGCHLD):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, CHILDREN)
for number, name in enumerate((os.devnull, "stdout", "stderr")):
    os.dup2(os.open(os.path.join(request["folder"], name), os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
os.chdir(request["cwd"])
os.environ.update(request["environment"])
script, *arguments = request["arguments"]
if script == "-m":
    sys.argv, sys.path[0] = arguments, request["cwd"]
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")
