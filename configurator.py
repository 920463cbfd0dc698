"""
Settings from the command line, and errors that a user can fix.

A script's settings are its plain global variables. Config files and --name=value override them, in
the order of the command line:

    python train_stage1.py config/cifar10.py --batch_size=64 --out_dir=out/small-batch

A config file holds `name = value` lines. Values, there and on the command line, are Python literals
(numbers, strings, True/False, tuples). They are never executed.
"""

import ast
import difflib
import errno
import inspect
import math
import os
import sys
from functools import partial
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix. Scripts end with its message on one line, and exit code 2."""


def configure(scope, argv):
    """Overrides the settings in `scope`, a script's globals(), by the command line. -> them, as a dict

    Settings are the bool, int, float, str and tuple variables, except _private names and CONSTANTS. A
    new value must have the default's type; a number makes a tuple of one. ~ at the start of a string is the home
    folder. Defaults replace what an earlier call set. Raises UserError for an unknown name (with the nearest valid
    one), for a wrong type, and for anything that can't be parsed. --help prints the script's docstring and
    settings, and exits.
    """
    sys.excepthook = partial(_one_line_for_user_errors, scope)
    # a stream may be closed, as by 2>&-
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: an unprintable name must not end a run
    defaults = {name: value for name, value in scope.items()
                if not (name.startswith("_") or name.isupper()) and isinstance(value, (bool, int, float, str, tuple))}
    for name, (default, given) in scope.get("_given", {}).items():  # set by an earlier call, as in a notebook
        if scope[name] is given:
            defaults[name] = default
    settings = dict(defaults)
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
            new = read_config_file(_at_home(argument, argument))
        for name, value, where in new:
            if name not in settings:
                containing = [known for known in settings if name in known]
                nearest = (containing or difflib.get_close_matches(name, settings, n=1, cutoff=0))[0]
                hint = f"the nearest is {nearest!r}" if len(name) > 2 else "--help lists all"
                raise UserError(f"{where}: there is no setting {name!r}; {hint}")
            settings[name] = _checked(name, value, defaults[name], where)
    require(settings.get("out_dir") != "", "--out_dir= names no folder: --out_dir=. is the current one")
    scope.update(settings, _given={name: (default, settings[name]) for name, default in defaults.items()})
    return settings


def is_default(scope, name):
    """Whether a setting in `scope`, which `configure` has set, has its default value."""
    default, value = scope["_given"][name]
    return value == default


def require(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_numbers(config, or_zero=(), but=()):
    """Raises UserError unless every number among the settings is positive and finite.

    or_zero: settings that may be 0; but: settings that are not checked here.
    """
    for name, value in config.items():
        if type(value) in (int, float) and name not in but:
            require(value >= 0 or name not in or_zero, f"{name} can't be negative: it is {value}")
            require(value > 0 or name in or_zero, f"{name} must be positive, not {value}")
            require(math.isfinite(value), f"{name} must be finite, not {value}")


def arguments_of(config, *functions):
    """-> {name: value} of the settings that are parameters of these functions or classes"""
    return {name: config[name] for f in functions for name in inspect.signature(f).parameters if name in config}


def _at_home(path, where):
    """Replaces ~ or ~name at the start of a path by the home folder."""
    full = os.path.expanduser(path)
    require(not full.startswith("~"),
            f"{where}: no home folder is known for {path.partition('/')[0]}; write the path in full")
    return full


def say(line):
    """Prints a line on stderr, from process 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _literal(text):
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text  # a bare word; `_checked` refuses it unless the setting is a string


def read_config_file(path):
    """-> [(name, value, where)] of the file's `name = literal` lines. Raises UserError if there are others."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # editors on Windows may put a byte-order mark first
            tree = ast.parse(f.read())
    except OSError as error:
        raise UserError(f"can't read the config file {path}: {error.strerror}") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{path} is not a config file: {error}") from None
    new = []
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # its docstring
        try:
            (target,) = node.targets
            new.append((target.id, ast.literal_eval(node.value), where))
        except (AttributeError, ValueError, TypeError):
            raise UserError(f"{where}: only lines of the form `name = literal` are read") from None
    return new


def _checked(name, value, default, where):
    kind = type(default)
    numbers = value if type(value) in (tuple, list) else [value]
    require(all(abs(n) < 2 ** 62 for n in numbers if type(n) is int),
            f"{where}: a whole number can't be 2^62 or more")
    if kind is float and (type(value) is int or value in ("inf", "-inf")):
        value = float(value)
    if kind is tuple and type(value) in (int, float, list):
        value = tuple(numbers)
    if kind is tuple and type(value) is tuple and default and type(default[0]) is float:
        value = tuple(float(item) if type(item) is int else item for item in value)
    fits = type(value) is kind
    if fits and kind is tuple and default:
        fits = all(type(item) is type(default[0]) for item in value)
    if not fits:
        article = "an" if kind is int else "a"
        raise UserError(f"{where}: {name} takes {article} {kind.__name__} such as {default!r}, not {value!r}")
    return _at_home(value, where) if kind is str else value


def _usage(scope, settings):
    with open(scope["__file__"], encoding="utf-8") as f:
        source = f.read()
    spans = [(node.lineno, node.end_lineno) for node in ast.parse(source).body
             if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in settings]
    block = source.splitlines()[spans[0][0] - 1:spans[-1][1]]
    return "\n".join([scope["__doc__"].strip(), "", "Settings and their defaults:", "", *block])


def out_of_memory(error):
    """Whether memory ran out. PyTorch has an exception for a GPU's memory, none for the host's."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "not enough memory" in said or "can't allocate memory" in said)


def _one_line_for_user_errors(scope, kind, error, traceback):
    """A script's excepthook: turns an error that the user can fix into one line. scope: its globals"""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: the same command goes on from what has been saved, if anything", file=sys.stderr)
        sys.exit(130)
    folder = scope.get("out_dir")
    if issubclass(kind, UserError):
        line = error
    elif out_of_memory(error):
        line = "out of memory"
        if setting := next((name for name in ("batch_gpu", "batch_size") if name in scope), None):
            at_once = f", {scope['_micro_batch']} images at once" if "_micro_batch" in scope else ""
            line += f": a smaller --{setting} may help; it is {scope[setting]}{at_once}"
        if os.path.exists(scope.get("_checkpoint_path", "")):
            line += f". {scope['_checkpoint_path']} is untouched"
    elif isinstance(error, BrokenPipeError) and not error.filename:
        line = "the program that reads this output has ended, as `head` does: write the output to a file instead"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains again when it ends
    elif isinstance(error, OSError) and (error.errno == errno.ENAMETOOLONG
                                         or folder and Path(folder) in Path(str(error.filename), "-").parents):
        line = f"can't read or write {error.filename}: {error.strerror}"  # the disk or the file went away
    else:
        sys.__excepthook__(kind, error, traceback)
        return
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(line))  # names may hold line breaks
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
