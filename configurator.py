"""
How a run is set up: settings, errors, processes.

The settings of a script are its plain global variables. They are overridden by config files, then by
--name=value, in the order of the command line:

    python train_stage1.py config/cifar10.py --batch_size=64 --out_dir=out/small-batch

A config file holds `name = value` lines. It and the command line are read as Python literals (numbers,
strings, True/False, tuples) and never executed.
"""

import ast
import difflib
import errno
import os
import sys
import time
import weakref
from datetime import timedelta
from functools import partial
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. Scripts end with its message in one line, and exit code 2."""


def configure(scope, argv=None):
    """Overrides the settings in `scope`, a script's globals(), by the command line; returns them as a dict.

    Settings are the bool, int, float, str and tuple variables set so far, but for _private names and
    CONSTANTS; a new value must be of the default's type, and ~ at the start of a string is the home folder. Raises
    UserError for an unknown name (with the nearest valid one), a wrong type, or anything that can't be parsed. --help
    prints the script's docstring and settings, and exits.
    """
    sys.excepthook = partial(_one_line_for_user_errors, scope)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed, as by 2>&-
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: a name that can't be printed ends no run
    argv = sys.argv[1:] if argv is None else argv
    settings = {name: value for name, value in scope.items()
                if not (name.startswith("_") or name.isupper()) and isinstance(value, (bool, int, float, str, tuple))}
    if "--help" in argv or "-h" in argv:
        print(_usage(scope, settings))
        sys.exit(0)
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if not equals:
                raise UserError(f"{argument}: settings are written --name=value")
            new = [(name, text if isinstance(settings.get(name), str) else _literal(text), argument)]
        else:
            new = _read_config_file(_at_home(argument, argument))
        for name, value, where in new:
            if name not in settings:
                nearest = difflib.get_close_matches(name, settings, n=1, cutoff=0)
                raise UserError(f"{where}: there is no setting {name!r}; the nearest is {nearest[0]!r}")
            settings[name] = _checked(name, value, scope[name], where)
    require(settings.get("out_dir") != "", "--out_dir= names no folder: --out_dir=. is the one that you are in")
    scope.update(settings)
    return settings


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def _at_home(path, where):
    """With the home folder in place of ~ at its start, or of ~name."""
    found = os.path.expanduser(path)
    require(not found.startswith("~"), f"{where}: no home folder is known for {path.partition('/')[0]}; write the path in full")
    return found


def say(line):
    """Prints a line on stderr, of one process."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _literal(text):
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text  # a bare word: right only where a string is wanted, which `_checked` sees


def _read_config_file(path):
    """-> [(name, value, where)] of the file's `name = literal` lines."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # Windows' editors put a mark first
            tree = ast.parse(f.read())
    except OSError as error:
        raise UserError(f"can't read the config file {path}: {error.strerror}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{path} is not a config file: {error}") from None
    found = []
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # its docstring
        try:
            (target,) = node.targets
            found.append((target.id, ast.literal_eval(node.value), where))
        except (AttributeError, ValueError, TypeError):
            raise UserError(f"{where}: only lines of the form `name = literal` are read") from None
    return found


def _checked(name, value, default, where):
    kind = type(default)
    numbers = value if type(value) in (tuple, list) else [value]
    require(all(abs(n) < 2 ** 62 for n in numbers if type(n) is int), f"{where}: a whole number can't be 2^62 or more")
    if kind is float and (type(value) is int or value in ("inf", "-inf")):
        value = float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if kind is tuple and type(value) is tuple and default and type(default[0]) is float:
        value = tuple(float(item) if type(item) is int else item for item in value)
    fits = type(value) is kind
    if fits and kind is tuple and default:
        fits = all(type(item) is type(default[0]) for item in value)
    if not fits:
        raise UserError(f"{where}: {name} takes a {kind.__name__} such as {default!r}, not {value!r}")
    return _at_home(value, where) if kind is str else value


def _usage(scope, settings):
    with open(scope["__file__"], encoding="utf-8") as f:
        source = f.read()
    spans = [(node.lineno, node.end_lineno) for node in ast.parse(source).body
             if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in settings]
    block = source.splitlines()[spans[0][0] - 1:spans[-1][1]]
    return "\n".join([scope["__doc__"].strip(), "", "Settings and their defaults:", "", *block])


def out_of_memory(error):
    """Whether this error means that memory ran out. PyTorch has an exception for the GPU's memory, none for the host's."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "not enough memory" in said or "can't allocate memory" in said)


def _one_line_for_user_errors(scope, kind, error, traceback):
    """The excepthook of a script with these globals: an error that the user can fix becomes one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: the same command goes on from what has been saved, if anything", file=sys.stderr)
        sys.exit(130)
    folder = scope.get("out_dir")
    if issubclass(kind, UserError):
        line = error
    elif out_of_memory(error):
        line = "out of memory"
        if setting := next((name for name in ("batch_gpu", "batch_size") if name in scope), None):
            at_once = f", {scope['micro_batch']} images at once" if "micro_batch" in scope else ""
            line += f": a smaller --{setting} may help; it is {scope[setting]}{at_once}"
        if os.path.exists(scope.get("checkpoint_path", "")):
            line += f". {scope['checkpoint_path']} is untouched"
    elif isinstance(error, BrokenPipeError) and not error.filename:
        line = "the program that reads this output has ended, as `head` does: write the output to a file instead"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it ends
    elif isinstance(error, OSError) and (error.errno == errno.ENAMETOOLONG
                                         or folder and Path(folder) in Path(str(error.filename), "-").parents):
        line = f"can't read or write {error.filename}: {error.strerror}"  # the disk went away, or somebody deleted it
    else:
        sys.__excepthook__(kind, error, traceback)
        return
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(line))  # names may hold line breaks and worse
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def start_processes(device):
    """-> rank, number of processes, torch.device. Joins the others where torchrun started this process.

    device: "auto", "cpu", "cuda", "cuda:1", "mps" (Apple's GPUs, for one process). Raises UserError where this machine has
    no such device.
    """
    import torch  # here, so that this file can be read and used without it

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    kind = device.partition(":")[0]
    require(kind in ("cpu", "cuda", "mps"), f"--device={device} can't be used here: it is auto, cpu, cuda or mps")
    require(kind != "mps" or world == 1, f"--device={device} is for one process: {world} can't work together there")
    require(kind != "mps" or torch.backends.mps.is_available(), f"--device={device} can't be used here: it is for Apple's GPUs")
    try:
        place = torch.device(device)
        if place.type == "cuda" and (world > 1 or place.index is None):
            place = torch.device("cuda", local_rank)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device={device} can't be used here: {str(error).splitlines()[0]}") from None
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        hook = sys.excepthook  # init_process_group puts its own around it, which would swallow our one line
        limit = timedelta(hours=1)  # process 0 draws previews and encodes data sets while the others wait
        store, rank, _ = next(torch.distributed.rendezvous("env://", timeout=limit))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's store outlives its workers, and would give those that it restarts the addresses of the dead. (On
            # several nodes the counts may differ: see the README for what to set there.)
            store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", store=store, rank=rank,
                                             world_size=world, timeout=limit)
        sys.excepthook = hook
    return int(os.environ.get("RANK", 0)), world, place


_in_flight = []  # weak references to tensors that gloo's threads may hold


def _all_reduce(x, op):
    """The sum or maximum of the processes' tensors: a new one, on the CPU."""
    import torch

    x = x.cpu().clone()
    torch.distributed.all_reduce(x, op)
    _in_flight[:] = [ref for ref in (*_in_flight, weakref.ref(x)) if ref() is not None]
    return x


def leave_processes():
    """The end of what `start_processes` began; before it, a `barrier` lets process 0 finish what the others wait for.

    gloo's threads hold tensors a little longer than an operation takes, after a `barrier` above all, and need Python to let
    go of them. If Python ends at that moment, the process is aborted (SIGABRT); so they are waited for.
    """
    import torch

    while any(ref() is not None for ref in _in_flight):
        time.sleep(0.001)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier():
    """Waits until all processes have come here."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def sum_over_processes(x):
    """The sum of the processes' tensors, in place of each."""
    import torch

    if torch.distributed.is_initialized():
        x.copy_(_all_reduce(x, torch.distributed.ReduceOp.SUM))


def mean_over_processes(x):
    """The mean of the processes' tensors."""
    import torch

    if torch.distributed.is_initialized():
        x = _all_reduce(x, torch.distributed.ReduceOp.SUM) / torch.distributed.get_world_size()
    return x


def max_over_processes(number):
    """The largest of the processes' numbers, for which all of them ask together. Nothing waits for a GPU."""
    import torch

    if torch.distributed.is_initialized():
        number = _all_reduce(torch.tensor(number), torch.distributed.ReduceOp.MAX).item()
    return number


def on_any_process(flag):
    """Whether `flag` is true on any of the processes, which all ask together."""
    return bool(max_over_processes(int(flag)))


def same_on_all(number):
    """Whether all processes have this number."""
    return max_over_processes(number) == -max_over_processes(-number)
