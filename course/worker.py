"""
Runs the checks of one answer after another for grade.py, each in a process of its own. Not for the command line.

It reads jobs from stdin, a JSON object per line: folder (a tree made by grade.py, with check.py in it),
submission (a file), seed, seconds, memory (bytes). For each it forks; the child limits itself, takes the asked
functions from the submission, and writes what it finds to the folder's result.json. Then the worker ends what the
child has left running, and answers with a line: "done", "time" if that ran out, or the exit code, negative for a
signal.

The worker imports torch once and runs nothing of a submission itself. The child's limits and its ban on files and
processes catch mistakes and simple mischief. They are no sandbox: Python can't be one.
"""

import json
import linecache
import os
import resource
import signal
import sys
import time
import types
from pathlib import Path

import torch

BANNED = ("os.fork", "os.posix_spawn", "os.exec", "os.system", "os.kill", "os.remove", "os.rename", "os.mkdir",
          "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "subprocess.Popen",
          "socket.", "shutil.", "pty.", "ctypes.dlopen", "signal.pthread_kill", "resource.")
LARGEST = 1 << 20  # bytes that a child may print


def ban(event, arguments):
    """An audit hook: raises where a submission starts a process, opens a connection or writes a file."""
    if event.startswith(BANNED):
        raise PermissionError(f"an answer may not do this: {event}")
    if event == "open" and (set(str(arguments[1])) & set("wax+") or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        raise PermissionError("an answer may not write files")


def limit(seconds, memory):
    for kind, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, memory),
                        (resource.RLIMIT_FSIZE, LARGEST), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NPROC, 0)):  # no new process or thread; it does not bind root
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def module_with(answer, exercise, tree):
    """The exercise's module in the tree, with the answer's functions, as if it had been imported from there."""
    from source import Wrong, answered, blanked
    path = tree / f"{exercise['file']}.py"
    text = path.read_text(encoding="utf-8")
    for name in exercise["functions"]:
        try:
            text = answered(text, name, answer)
        except Wrong as wrong:  # the exercise's other functions may be right
            text = blanked(text, name, str(wrong))
    module = types.ModuleType(exercise["file"])
    module.__file__ = str(path)
    code = compile(text, str(path), "exec")
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))  # for explanations
    sys.modules[exercise["file"]] = module
    exec(code, vars(module))
    return module


def child(job):
    """Checks one answer, and writes result.json."""
    tree = Path(job["folder"])
    os.chdir(tree)
    sys.path[:0] = [str(tree / "course"), str(tree)]
    with open("result.json", "w", encoding="utf-8") as result:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd in (1, 2):
            os.dup2(os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", errors="replace", closefd=False) for fd in (1, 2))
        limit(job["seconds"], job["memory"])
        from check import in_words, verdict
        from source import read_answer
        exercise = json.loads(Path("course/sheet.json").read_text(encoding="utf-8"))["exercises"][0]
        __import__(exercise["checks"])
        sys.addaudithook(ban)
        found = {"results": [], "says": ""}
        try:
            answer = read_answer(Path(job["submission"]))
            _, results, explanation = verdict(exercise, module_with(answer, exercise, tree), job["seed"])
            found["results"] = [[says, str(complaint)[:500]] for says, complaint in results]
            found["says"] = str(explanation)[:500]
        except BaseException as error:
            found["says"] = str(in_words(error, exercise))[:500]
        json.dump(found, result)


def watched(job):
    """Runs one job in a child, and ends it and its process group at the latest after the time limit. -> how it ended"""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            child(job)
            code = 0
        finally:
            os._exit(code)
    until, ended = time.monotonic() + job["seconds"], None
    while ended is None:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended = "time"
            continue
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            ended = f"{code}" if code else "done"
        else:
            time.sleep(0.01)
    try:
        os.killpg(pid, signal.SIGKILL)  # what the child has started itself
    except (ProcessLookupError, PermissionError):
        pass
    return ended


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(watched(json.loads(line)), flush=True)
