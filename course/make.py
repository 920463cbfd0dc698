"""
Makes a hand-out: the real sources with the functions of a set of exercises blanked, its page, its checks.

    python course/make.py --set=A --out=../hw1                # six to eight hours of work
    python course/make.py --set=A --out=../hw1 --variant=1    # other tasks, so that last year's answers don't fit
    python course/make.py --set=B --out=../hw2 --notebook     # a notebook besides, hw2/set-B.ipynb, for Colab too

All is taken from the code as it is now. It stops if a file of the hand-out repeats a formula of an answer:
then that place must join the exercise's `twins` in exercises.py.
"""

import ast
import base64
import functools
import io
import json
import shutil
import sys
import textwrap
import types
import zipfile
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import torch
from check import outputs
from exercises import SETS, exercises
from source import blanked, edited, find, in_their_class, names_in, repeats, text_of, with_function

from configurator import UserError, configure, require

set = "A"  # or B
out = ""  # the folder to make
variant = 0
notebook = False

CHECKS = {"model": "check_model", "toy_measures": "check_process", "diffusion": "check_process", "prior": "check_prior",
          "sedd": "check_sedd", "metrics": "check_metrics"}  # by the file of an exercise
SHIPPED = ("check.py", "source.py", "measures.py", "draw.py")  # of this folder, with the checks that are needed

# ----------------------------------------------------------------------------------------------------
# texts: {file: text} of the Python files in the repository's first folder


def solution(chosen):
    """The real sources, with what the variants change: the right answers to these exercises."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
    for exercise in chosen:
        file = f"{exercise.file}.py"
        for function, old, new in exercise.edits:
            texts[file] = changed(texts[file], exercise, function, old, new)
    return texts


def changed(text, exercise, function, old, new):
    """The text with one piece of a function replaced. Raises UserError if the live source no longer has it."""
    try:
        return edited(text, function, [(old, new)])
    except LookupError as error:
        raise UserError(f"course/exercises.py, {exercise.name}: {error} in {exercise.file}.py. Bring it up to "
                        "date") from None


def hand_out(texts, chosen):
    """These sources with the functions of the exercises blanked, and their twins too."""
    texts = dict(texts)
    for exercise in chosen:
        label = f"exercise {exercise.number} {exercise.name}"
        places = [(exercise.file, name, f"{label}: write {name}") for name in exercise.functions]
        places += [(file, name, f"left out, since it holds the answer to {label}") for file, name in exercise.twins]
        for file, name, message in places:
            try:
                texts[f"{file}.py"] = blanked(texts[f"{file}.py"], name, message)
            except LookupError as error:
                raise UserError(f"course/exercises.py, {exercise.name}: {error} in {file}.py") from None
    return texts


def nodes(texts, chosen):
    """The parsed functions of these exercises, in these texts."""
    return [find(ast.parse(texts[f"{exercise.file}.py"]), name) for exercise in chosen for name in exercise.functions]


def module_of(text, name):
    """A module with this text in place of the file NAME.py."""
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / f"{name}.py")
    exec(compile(text, module.__file__, "exec"), vars(module))
    return module


# ----------------------------------------------------------------------------------------------------
# what goes with them


def wrong_answers(texts, exercise):
    """The known wrong answers -> [(text of the exercise's file, what is said)]

    A variant's are those of its exercise that can be made of it, and the answer to the exercise as it was.
    """
    right = texts[f"{exercise.file}.py"]
    code = "\n".join(text_of(right, name) for name in exercise.functions)
    is_variant = bool(exercise.options)
    answers = [(changed(right, exercise, function, old, new), says) for function, old, new, says in exercise.wrong
               if not is_variant or old in code]
    if is_variant and exercise.edits:
        usual = (ROOT / f"{exercise.file}.py").read_text(encoding="utf-8")
        for name in exercise.functions:
            right = with_function(right, name, text_of(usual, name))
        answers.append((right, "your output is that of the usual task, of which this one is a variant: read it again"))
    return answers


@functools.cache
def sheet(which, variant=0):
    """What check.py must know of a set of exercises, without any code: a dict, to be written as JSON."""
    chosen = exercises(which, variant)
    texts, listed = solution(chosen), []
    for exercise in chosen:
        text = texts[f"{exercise.file}.py"]
        entry = dict(
            number=exercise.number, name=exercise.name, title=exercise.title, file=exercise.file,
            functions=exercise.functions, points=exercise.points, minutes=exercise.minutes, picture=exercise.picture,
            checks=CHECKS[exercise.file], options=exercise.options, names=sorted(names_in(text)))
        entry["wrong"] = [dict(says=says, output=outputs(entry, module_of(answer, exercise.file)))
                          for answer, says in wrong_answers(texts, exercise)]
        listed.append(entry)
    return {"set": which, "variant": variant, "exercises": listed}


def one_line(text):
    return " ".join(text.split())


def section(exercise, in_notebook):
    """An exercise's part of the page."""
    functions = ", ".join(f"`{name}`" for name in exercise.functions)
    twins = "".join(f" `{name}` in {file}.py is left out too: it holds the answer in another form."
                    for file, name in exercise.twins)
    body = "\n".join(textwrap.wrap(one_line(exercise.task) + twins, 105))
    way = "Complete the cell below and run it." if in_notebook else f"```\npython course/check.py {exercise.name}\n```"
    return f"""## {exercise.number}. {exercise.title}

{functions} in `{exercise.file}.py` | {exercise.points} points | about {exercise.minutes} minutes | {exercise.paper}

{body}

{way}

The picture: {exercise.picture}.

<details><summary>A hint</summary>

{one_line(exercise.hint)}

</details>
"""


def questions(which):
    """The written questions of a set, as they stand in written.md."""
    parts = (HERE / "written.md").read_text(encoding="utf-8").split("\n## ")
    return "".join(f"\n## {part}" for part in parts[1:] if part.startswith(which))


START = """```
python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt
python course/check.py
```

The check says what is missing. Everything that you need is in this folder; nothing is downloaded but the packages."""
HAND_IN = """When you are done, or as far as you got:

```
python course/check.py --pack
```

This writes one file, `submission-{}.py`, with your functions. Hand that in, and the answers to the written questions
separately.
"""
REWARD = """
With all exercises done, the network in `pretrained/` draws clothes through your code, in `out/samples.png`:

```
python sample.py --init_from=pretrained
```
"""
IN_NOTEBOOK = """Run the next two cells: they unpack the files into the folder `nanodisco-{0}`. Each exercise has a cell
that begins with `%%exercise`: complete its functions and run it. This puts them into their file, checks them and
shows the picture. `!cat nanodisco-{0}/model.py` in a cell of your own shows a whole file."""
HAND_IN_OF_NOTEBOOK = """When you are done, or as far as you got, run the last cell. It writes one file,
`submission-{}.py`, with your functions. Hand that in, and the answers to the written questions separately.
"""


def page(which, chosen, in_notebook=False):
    """The page for students. A variant may not fit the pretrained network, which is not in its hand-out then."""
    usual = not any(exercise.edits and exercise.options for exercise in chosen)
    start, hand_in = (IN_NOTEBOOK, HAND_IN_OF_NOTEBOOK) if in_notebook else (START, HAND_IN + REWARD * usual)
    return Template((HERE / "handout.md").read_text(encoding="utf-8")).substitute(
        set=which, count=len(chosen), points=sum(exercise.points for exercise in chosen),
        hours=f"{sum(exercise.minutes for exercise in chosen) / 60:.0f}", start=start.format(which),
        hand_in=hand_in.format(which), exercises="\n".join(section(exercise, in_notebook) for exercise in chosen),
        questions=questions(which).strip())


def files_of(which, variant, asked):
    """All text files of a hand-out but its page, {path: text}, in which some exercises of a set are asked."""
    files = hand_out(solution(exercises(which, variant)), asked)
    described = sheet(which, variant)
    described = described | {"exercises": [e for e in described["exercises"] if e["name"] in {a.name for a in asked}]}
    for name in sorted({*SHIPPED, *(f"{CHECKS[exercise.file]}.py" for exercise in asked)}):
        files[f"course/{name}"] = (HERE / name).read_text(encoding="utf-8")
    return files | {"course/sheet.json": json.dumps(described)}


def require_no_answers(texts, chosen):
    """Raises UserError where a Python file of a hand-out repeats a formula of an answer."""
    answers = nodes(solution(chosen), chosen)
    found = repeats(answers, {name: text for name, text in texts.items() if name.endswith(".py")})
    require(not found, "the hand-out would give answers away, as these places repeat formulas of them: "
            + "; ".join(found) + ". Name the place among the exercise's twins in course/exercises.py")


def write(folder, files):
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------
# the notebook


def as_notebook(which, files, chosen):
    """The hand-out as one .ipynb, which carries all its files and unpacks them. -> a dict, to be written as JSON"""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in (files | {"course/cells.py": (HERE / "cells.py").read_text(encoding="utf-8")}).items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # its date is always the same
    unpack = f"""# Run this cell first: it unpacks the hand-out. torch, numpy and Pillow must be there, as in Colab.
import base64, io, pathlib, sys, zipfile
folder = pathlib.Path("nanodisco-{which}")
if not folder.exists():
    zipfile.ZipFile(io.BytesIO(base64.b64decode(FILES))).extractall(folder)
sys.path.insert(0, str(folder / "course"))
import cells
cells.start()"""
    before, start, *sections = page(which, chosen, in_notebook=True).split("\n## ")
    carried = base64.b64encode(packed.getvalue()).decode()
    listed = [("markdown", f"{before}\n## {start}"), ("code", f'FILES = "{carried}"'), ("code", unpack)]
    for part in sections:
        listed.append(("markdown", f"## {part}"))
        if exercise := next((e for e in chosen if part.startswith(f"{e.number}. {e.title}\n")), None):
            blanks = "\n\n".join(in_their_class(name, text_of(files[f"{exercise.file}.py"], name))
                                 for name in exercise.functions)
            listed.append(("code", f"%%exercise {exercise.name}\n{blanks}"))
    listed.append(("code", "cells.pack()"))
    return {"nbformat": 4, "nbformat_minor": 4,
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "cells": [{"cell_type": kind, "metadata": {}, "source": text}
                      | ({"outputs": [], "execution_count": None} if kind == "code" else {}) for kind, text in listed]}


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    configure(globals(), ["--notebook=True" if a == "--notebook" else a for a in argv])
    require(set in SETS, f"--set={set}: there are {' and '.join(SETS)}")
    require(out, "--out=FOLDER says where to put the hand-out")
    torch.set_num_threads(1)  # tensors here are tiny
    folder = Path(out)
    require(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
            f"{out} is there already: name a new folder, or delete it")
    chosen = exercises(set, variant)
    files = files_of(set, variant, chosen)
    require_no_answers(files, chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make {out}: {error.strerror}") from None
    files["README.md"] = page(set, chosen)
    for path in (*sorted((ROOT / "config").glob("*.py")), ROOT / "requirements.txt", ROOT / "LICENSE"):
        files[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    write(folder, files)
    if REWARD in files["README.md"]:
        shutil.copytree(ROOT / "pretrained", folder / "pretrained")
    if notebook:
        text = json.dumps(as_notebook(set, files, chosen), indent=1)
        (folder / f"set-{set}.ipynb").write_text(text, encoding="utf-8")
    minutes, points = (sum(getattr(exercise, name) for exercise in chosen) for name in ("minutes", "points"))
    print(f"{out}: {len(chosen)} exercises, {points} points, {minutes / 60:.1f} hours; its page is {out}/README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
