"""
Checks your answers: says which properties hold, explains the first that fails, and draws a picture.

    python course/check.py                  # all exercises
    python course/check.py heun             # one of them, or several: heun guidance
    python course/check.py heun --seed=5    # with other random numbers
    python course/check.py --pack           # writes submission-A.py, the file to hand in

An exercise's points are shared equally among its properties. Needs torch and numpy; pictures, which go to
out_dir, need Pillow too. On the finished repository, where no sheet.json lies beside this file, all
exercises of all sets are checked.
"""

import ast
import errno
import hashlib
import importlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from source import Wrong, find, in_their_class, names_used, parsed, statements, suspicious, text_of

from configurator import UserError, configure, require

out_dir = "out/course"  # for the pictures
only = ""  # names of exercises, separated by commas; empty: all
seed = "0"
pack = False

UNWRITTEN = "not written yet"

# ----------------------------------------------------------------------------------------------------
# one exercise, as sheet.json describes it


def generator(*key):
    """A random generator that depends on these words and numbers alone."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


def examine(exercise, module, seed):
    """Tries one property of an exercise after another on a module. Yields (property, complaint), "" where it holds"""
    torch.manual_seed(0)
    checks = getattr(importlib.import_module(exercise["checks"]), exercise["name"])
    for i, (says, check) in enumerate(checks(module, **exercise["options"])):
        try:
            complaint = check(generator(seed, exercise["name"], i)) or ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a student's code may raise, SystemExit too
            complaint = in_words(error, exercise)
        yield says, complaint


def in_words(error, exercise):
    """What an exception means to the student."""
    if isinstance(error, Wrong):
        return str(error)
    if isinstance(error, NotImplementedError) and str(error).startswith("exercise "):
        number, name = str(error).split(":")[0].split()[1:]
        return UNWRITTEN if name == exercise["name"] else f"exercise {number} ({name}) comes first: this one calls it"
    if isinstance(error, NotImplementedError):
        return str(error)
    if isinstance(error, SystemExit):
        return "your code ends the program"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "your code prints or writes too much"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).stem == exercise["file"]]
    where = f', in {own[-1].name}: "{own[-1].line}"' if own else ""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"


def outputs(exercise, module):
    """What a module returns at the fixed inputs, as a list of numbers with six digits; None for NaN."""
    torch.manual_seed(0)
    probe = getattr(importlib.import_module(exercise["checks"]), f"{exercise['name']}_probe")
    values = torch.cat([torch.as_tensor(value).detach().double().flatten() for value in probe(module)])
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


def recognised(exercise, module):
    """What is said of the known wrong answer that returns the same as this module, "" if there is none."""
    try:
        found = np.array(outputs(exercise, module), float)
    except BaseException:
        return ""
    for wrong in exercise["wrong"]:
        known = np.array(wrong["output"], float)
        if known.shape == found.shape and np.allclose(found, known, rtol=1e-4, atol=1e-5, equal_nan=True):
            return wrong["says"]
    return ""


def verdict(exercise, module, seed):
    """-> points, [(property, complaint)], and what explains the first failure"""
    results = list(examine(exercise, module, seed))
    failed = [complaint for _, complaint in results if complaint]
    explanation = failed and (recognised(exercise, module) or failed[0])
    return exercise["points"] * (1 - len(failed) / len(results)), results, explanation or ""


def report(exercise, points, results, explanation):
    """-> lines for the student"""
    head = f"{exercise['number']} {exercise['name']}: {exercise['title']}, {points:.3g} of {exercise['points']} points"
    if explanation == UNWRITTEN:
        return [f"{head}: {UNWRITTEN}"]
    lines = [head]
    for says, complaint in results:
        lines.append(f"   {'-' if complaint else '+'} {says}")
        if complaint and explanation:
            lines.append(f"     {explanation}")
            explanation = ""
    return lines


def answer_of(exercise):
    """The student's module. Raises Wrong if it can't be imported."""
    try:
        return importlib.import_module(exercise["file"])
    except SyntaxError as error:
        raise Wrong(f"{Path(error.filename).name}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise Wrong(f"importing {exercise['file']}.py fails: {type(error).__name__}: {error}") from None


def draw(exercise, module):
    """Draws an exercise's picture. -> a line about it"""
    try:
        import draw as pictures
    except ImportError:
        return "no picture: `pip install pillow` if you want one"
    try:
        picture = getattr(pictures, exercise["name"])(module, **exercise["options"])
    except Exception as error:
        return f"no picture yet: {in_words(error, exercise)}"
    path = Path(out_dir, f"{exercise['number']}-{exercise['name']}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return f"{path}: {exercise['picture']}"


# ----------------------------------------------------------------------------------------------------
# the file to hand in


def packed(sheet):
    """The text of the file to hand in: the asked functions alone. Raises UserError if there is something wrong.

    -> the text, the functions that are left out as they are not written yet
    """
    parts = [f"# nanoDisCo, set {sheet['set']}, variant {sheet['variant']}: made by course/check.py --pack\n"]
    missing = []
    for exercise in sheet["exercises"]:
        file = f"{exercise['file']}.py"
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
            tree = parsed(text, file)
        except ValueError:
            raise UserError(f"{file} is not written in UTF-8: save it so") from None
        except Wrong as error:
            raise UserError(error) from None
        for name in exercise["functions"]:
            node = find(tree, name)
            require(node is not None, f"{file} has no {name} any more: put it back")
            unknown = names_used(node) - {*exercise["names"]}
            require(not unknown, f"{name} uses {', '.join(sorted(unknown))}, which the hand-out's {file} does not "
                    f"have: put everything that you add inside {name}, imports too")
            if any(isinstance(s, ast.Raise) and "NotImplementedError" in ast.unparse(s) for s in statements(node)):
                missing.append(name)
            else:
                parts.append(f"\n# {exercise['number']}, {file}\n{in_their_class(name, text_of(text, name))}\n")
    return "".join(parts), missing


# ----------------------------------------------------------------------------------------------------
# the run


def sheet_here():
    """The sheet that make.py wrote beside this file; in the repository itself, that of all sets."""
    file = HERE / "sheet.json"
    if file.exists():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{file} is damaged: take it from the hand-out again") from None
    from exercises import SETS
    from make import sheet
    return {"set": "", "variant": 0, "exercises": [e for which in SETS for e in sheet(which)["exercises"]]}


def main(argv=()):
    names = ",".join(a for a in argv if not a.startswith("-"))
    argv = [a for a in argv if a.startswith("-")] + [f"--only={names}"] * bool(names)
    configure(globals(), ["--pack=True" if a == "--pack" else a for a in argv])
    torch.set_num_threads(1)  # tensors here are tiny
    sheet = sheet_here()
    known = [exercise["name"] for exercise in sheet["exercises"]]
    chosen = only.split(",") if only else known
    require({*chosen} <= {*known}, f"there is no exercise {only!r}: they are {', '.join(known)}")
    if pack:
        require(sheet["set"], "there is nothing to hand in here: this is the repository, not a hand-out")
        text, missing = packed(sheet)
        path = Path(f"submission-{sheet['set']}.py")
        path.write_text(text, encoding="utf-8")
        print(f"{path} is ready to be handed in" + f", without {', '.join(missing)}: not written yet" * bool(missing))
        if uses := suspicious(parsed(text)):
            print(f"It uses {', '.join(uses)}, which may be missing or refused where you are graded: torch, numpy and "
                  "math are enough")
        return
    total, most = 0, 0
    for exercise in sheet["exercises"]:
        if exercise["name"] in chosen:
            most += exercise["points"]
            try:
                module = answer_of(exercise)
                points, *rest = verdict(exercise, module, seed)
                print("\n".join(report(exercise, points, *rest)))
                if rest[-1] != UNWRITTEN:
                    print(f"   {draw(exercise, module)}\n", flush=True)
                total += points
            except Wrong as error:
                print("\n".join(report(exercise, 0, [("the file can be imported", "no")], str(error))) + "\n")
    print(f"{total:.3g} of {most} points")


if __name__ == "__main__":
    main(sys.argv[1:])
