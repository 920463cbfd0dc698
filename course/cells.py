"""
The notebook's side: a cell that begins with %%exercise NAME puts its functions into the hand-out's files and
checks them.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import json

from source import Wrong, answered, parsed


def exercise(name, cell):
    """Puts the functions of a cell into their file, and checks this exercise."""
    sheet = json.loads((HERE / "sheet.json").read_text(encoding="utf-8"))
    entry = next((entry for entry in sheet["exercises"] if entry["name"] == name.strip()), None)
    if entry is None:
        print(f"there is no exercise {name.strip()!r}: they are {', '.join(e['name'] for e in sheet['exercises'])}")
        return
    file = ROOT / f"{entry['file']}.py"
    text = file.read_text(encoding="utf-8")
    try:
        answer = parsed(cell, "this cell")
        for function in entry["functions"]:
            text = answered(text, function, answer)
    except Wrong as wrong:
        print(wrong)
        return
    file.write_text(text, encoding="utf-8")
    picture = ROOT / "out" / "course" / f"{entry['number']}-{entry['name']}.png"
    picture.unlink(missing_ok=True)
    run(entry["name"])
    if picture.exists():
        from IPython.display import Image, display
        display(Image(str(picture)))


def run(*arguments):
    """Runs check.py in the hand-out's folder, and prints what it prints."""
    command = [sys.executable, str(HERE / "check.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)


def pack():
    """Writes the file to hand in, beside the hand-out's files."""
    run("--pack")
    print(f"the folder is {ROOT}")


def start():
    """Makes %%exercise known to the notebook."""
    get_ipython().register_magic_function(exercise, "cell", "exercise")  # noqa: F821
