"""The course: hand-outs give nothing away, the real code gets all points, wrong answers are recognised, and a whole
course goes through, from the hand-out to the grades, with hostile submissions in it."""
import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

COURSE = ROOT / "course"
sys.path.insert(0, str(COURSE))

import check
import grade
import make
import source
from exercises import SETS, exercises, last_variant

from configurator import UserError

CASES = [(which, variant, exercise) for which in SETS for variant in range(1 + last_variant(which))
         for exercise in exercises(which, variant)
         if not variant or exercise not in exercises(which, variant - 1)]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Scripts set their excepthook and their globals, and hand-outs have modules of the same names."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[2].number}-{case[2].name}-{case[1]}")
def case(request):
    """-> an exercise, its sheet, and the right answers to its set"""
    which, variant, exercise = request.param
    entry = next(e for e in make.sheet(which, variant)["exercises"] if e["name"] == exercise.name)
    return exercise, entry, make.solution(exercises(which, variant))


def solved(folder, which, variant=0):
    """Copies the real bodies into a hand-out."""
    chosen = exercises(which, variant)
    right = make.solution(chosen)
    for exercise in chosen:
        file = folder / f"{exercise.file}.py"
        for name in exercise.functions:
            file.write_text(source.with_function(file.read_text(), name, source.text_of(right[file.name], name)))


# ----------------------------------------------------------------------------------------------------
# exercises


def test_the_list_is_a_course():
    for which in SETS:
        chosen = exercises(which)
        assert 6 <= len(chosen) <= 7 and 6 <= sum(e.minutes for e in chosen) / 60 <= 8
        assert sum(e.points for e in chosen) == 60
        assert all(e.task and e.hint and e.paper and e.picture and len(e.wrong) >= 3 for e in chosen)
        assert make.questions(which).count("\n## ") == 5
    names = [exercise.name for _, _, exercise in CASES if not exercise.options]
    assert len(names) == len({*names}) >= 12
    pages = [(COURSE / name).read_text() for name in ("written.md", "written_answers.md")]
    asked, answered = (re.findall(r"^## (.*)", page, re.M) for page in pages)
    assert asked == answered and len(asked) == 10


def test_the_real_code_gets_all_points(case):
    exercise, entry, right = case
    module = make.module_of(right[f"{exercise.file}.py"], exercise.file)
    points, results, explanation = check.verdict(entry, module, "1")
    assert (points, explanation) == (exercise.points, "") and len(results) >= 3
    assert len({says for says, _ in results}) == len(results)


def test_wrong_answers_are_recognised(case):
    """Each fails a property, and is told what is wrong with it, not what is wrong with another."""
    exercise, entry, right = case
    answers = make.wrong_answers(right, exercise)
    assert len(answers) >= (len(exercise.wrong) if not exercise.options else 2)
    for answer, says in answers:
        module = make.module_of(answer, exercise.file)
        assert any(complaint for _, complaint in check.examine(entry, module, "1")), says
        assert check.recognised(entry, module) == says
    assert not check.recognised(entry, make.module_of(right[f"{exercise.file}.py"], exercise.file))


def test_blanks_import_and_fail(case):
    """The skeleton keeps signature and docstring, and fails every property."""
    exercise, entry, right = case
    text = make.hand_out(right, [exercise])[f"{exercise.file}.py"]
    module = make.module_of(text, exercise.file)
    points, _, explanation = check.verdict(entry, module, "1")
    assert (points, explanation) == (0, "not written yet")
    for name in exercise.functions:
        blank, real = (source.find(ast.parse(t), name) for t in (text, right[f"{exercise.file}.py"]))
        assert ast.dump(blank.args) == ast.dump(real.args) and ast.get_docstring(blank) == ast.get_docstring(real)
        assert [type(statement) for statement in source.statements(blank)] == [ast.Raise]


def test_a_student_is_told_in_words():
    entry = next(e for e in make.sheet("A")["exercises"] if e["name"] == "heun")
    real = (ROOT / "diffusion.py").read_text()
    for old, new, words in (
            ("(d + d_next) / 2", "(d + d_next) / 3", r"with 32, 64, 128 steps the errors are .*must quarter"),
            ("x_next = x + (t_next - t_hat) * d  #", "return None  #", "heun_step returns None, not a tensor"),
            ("x_next = x + (t_next - t_hat) * d  #", "raise SystemExit  #", "your code ends the program"),
            ("x_next = x + (t_next - t_hat) * d  #", "x_next = [x] + 1  #", "TypeError: can only concatenate list")):
        module = make.module_of(source.edited(real, "heun_step", [(old, new)]), "diffusion")
        points, _, explanation = check.verdict(entry, module, "0")
        assert 0 < points < 12 and re.match(words, explanation)


# ----------------------------------------------------------------------------------------------------
# hand-outs


@pytest.fixture(scope="module", params=["A", "B"])
def handed_out(request, tmp_path_factory):
    """-> the set, and the folder that make.py wrote"""
    folder = tmp_path_factory.mktemp("course") / request.param
    hook = sys.excepthook
    make.main([f"--set={request.param}", f"--out={folder}", "--notebook", "--variant=0"])
    sys.excepthook = hook
    return request.param, folder


def test_a_hand_out_holds_no_answer(handed_out):
    """Compared without names, comments and layout, and as text, docstrings too; no file that has answers is in it."""
    which, folder = handed_out
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
    answers = make.nodes(make.solution(exercises(which)), exercises(which))
    assert all(node is not None for node in answers) and not source.repeats(answers, texts)
    pages = [*texts.values(), (folder / "README.md").read_text(), (folder / f"set-{which}.ipynb").read_text()]
    squeezed = "".join("".join(page.split()) for page in pages)
    formulas = {"".join(ast.unparse(part).split()) for node in answers for part in source.formulas(node).values()}
    assert len(formulas) > 20 and not [formula for formula in formulas if formula in squeezed]
    assert {path.name for path in ROOT.glob("*.py")} < {*texts}
    course = {path.name for path in (folder / "course").iterdir() if not path.name.startswith("check")}
    assert course == {"sheet.json", "source.py", "measures.py", "draw.py"}
    assert not (folder / "tests").exists() and not (folder / "docs").exists()
    for name in (name for exercise in exercises(which) for name in exercise.functions):
        assert sum(f"write {name}\")" in text for text in texts.values()) == 1
    sheet = json.loads((folder / "course" / "sheet.json").read_text())
    wrong = [wrong for exercise in sheet["exercises"] for wrong in exercise["wrong"]]
    assert wrong and all(w.keys() == {"says", "output"} for w in wrong)
    assert {type(value) for w in wrong for value in w["output"]} <= {float, type(None)}


@pytest.mark.parametrize("which, variant", [("A", 1), ("A", 2), ("B", 1)])
def test_variants_hold_no_answer_either(which, variant):
    chosen = exercises(which, variant)
    make.require_no_answers(make.files_of(which, variant, chosen), chosen)


def test_a_hand_outs_page(handed_out):
    which, folder = handed_out
    page = (folder / "README.md").read_text()
    assert "$" not in page and f"submission-{which}.py" in page
    for exercise in exercises(which):
        assert f"## {exercise.number}. {exercise.title}\n" in page
        assert f"python course/check.py {exercise.name}\n" in page
    assert page.count("## A-" if which == "A" else "## B-") == 5 and ("A-" in page) == (which == "A")


def test_a_twin_that_is_not_named_is_refused():
    chosen = [e._replace(twins=()) if e.name == "heun" else e for e in exercises("A")]
    texts = make.hand_out(make.solution(chosen), [e for e in chosen if e.name == "heun"])
    with pytest.raises(UserError, match=r"diffusion.py: flow: x_next = x \+ \(t_next - t_i\) \* v"):
        make.require_no_answers(texts, chosen)


def test_a_copy_with_other_names_is_found():
    answer = source.find(ast.parse((ROOT / "diffusion.py").read_text()), "curvature")
    copy = "class A:\n    def f(self, p, q):\n        return (g(p) - g(q)).norm(dim=1) / (p * self).norm(dim=1)\n"
    assert source.repeats([answer], {"copy.py": copy}) == [f"copy.py: A.f: {copy.splitlines()[-1].strip()}"]
    assert not source.repeats([answer], {"other.py": copy.replace("dim=1", "dim=2")})
    product = "def f(a, s):\n    return a + S * (g(a) * (s[0] ** 2 - s[-1] ** 2).sqrt())\n"  # another order, entries
    assert source.repeats([source.find(ast.parse((ROOT / "diffusion.py").read_text()), "heun_step")], {"a.py": product})


def test_a_piece_of_code_that_has_changed_is_named():
    with pytest.raises(UserError, match=r"exercises.py, heun: heun_step has 'd_old' 0 times, not once in diffusion.py"):
        make.changed((ROOT / "diffusion.py").read_text(), exercises("A")[2], "heun_step", "d_old", "d")


@pytest.mark.parametrize("arguments, message", [
    (["--set=C", "--out=x"], "there are A and B"), ([], "--out=FOLDER"),
    (["--variant=-1", "--out=x"], "set A has variants 0 to 2"),
    (["--set=B", "--variant=2", "--out=x"], "set B has variants 0 to 1"), ([f"--out={ROOT}"], "is there already"),
    (["--out=/dev/null/x"], "can't make /dev/null/x")])
def test_make_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        make.main(["--set=A", "--out=", "--variant=0", *arguments])


class Notebook:
    """What IPython's get_ipython() returns, as far as cells.py needs it."""

    def register_magic_function(self, function, kind, name):
        assert (kind, name) == ("cell", "exercise")
        self.exercise = function


def test_the_notebook(handed_out, tmp_path, monkeypatch):
    """Its cells unpack the hand-out, and put an answer into its file."""
    which, folder = handed_out
    cells = json.loads((folder / f"set-{which}.ipynb").read_text())["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    blanks = [cell.partition("\n") for cell in code if cell.startswith("%%exercise ")]
    assert [head.split()[1] for head, _, _ in blanks] == [exercise.name for exercise in exercises(which)]
    assert all("NotImplementedError" in blank for _, _, blank in blanks) and code[-1] == "cells.pack()"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cells", raising=False)
    notebook = Notebook()
    monkeypatch.setattr("builtins.get_ipython", lambda: notebook, raising=False)
    exec(f"{code[0]}\n{code[1]}", {})
    loaded, checked = sys.modules.pop("cells"), []
    assert (tmp_path / f"nanodisco-{which}" / "model.py").read_text() == (folder / "model.py").read_text()
    monkeypatch.setattr(loaded, "run", lambda *arguments: checked.append(arguments))
    exercise = exercises(which)[-1]
    right = make.solution(exercises(which))[f"{exercise.file}.py"]
    notebook.exercise(exercise.name, "\n".join(source.text_of(right, name) for name in exercise.functions))
    unpacked = (tmp_path / f"nanodisco-{which}" / f"{exercise.file}.py").read_text()
    assert checked == [(exercise.name,)] and f"write {exercise.functions[0]}" not in unpacked


# ----------------------------------------------------------------------------------------------------
# a whole course

HANG = """
def gumbel_softmax(logits, tau, gumbel):
    import time
    time.sleep(1000)
def guided(denoise, w):
    import torch
    return torch.ones(10 ** 11)
"""
FORK = """
import os
os.mkdir("OUTSIDE")
def gumbel_softmax(logits, tau, gumbel):
    import os
    os.fork()
def guided(denoise, w):
    while True:
        print("flood" * 1000)
"""
FILES = """
def gumbel_softmax(logits, tau, gumbel):
    open("WRITTEN", "w").write("x")
def guided(denoise, w):
    import os
    os._exit(0)
"""
TAMPER = """
def gumbel_softmax(logits, tau, gumbel):
    import measures
    measures.far = lambda *arguments: False
    raise ValueError("\\ud800")
def guided(denoise, w):
    import torch
    torch.Tensor.shape = ()
"""
TYPES = """
def gumbel_softmax(logits, tau):
    return 0
def guided(denoise, w):
    return lambda x, sigma: "D"
"""


@pytest.mark.parametrize("handed_out", ["A"], indirect=True)
def test_a_whole_course(handed_out, tmp_path, monkeypatch, capsys):
    """Made, solved by copying the real bodies, checked, packed, graded beside hostile submissions."""
    which, folder = handed_out
    solved(folder, which)
    program = "import sys; sys.path.insert(0, 'course'); import check; check.main(); check.main(['--pack'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["60 of 60 points", "submission-A.py is ready to be handed in"]
    pictures = {path.name for path in (folder / "out/course").iterdir()}
    assert pictures == {f"{e.number}-{e.name}.png" for e in exercises("A")}

    monkeypatch.chdir(tmp_path)
    submissions = Path("submissions")
    for name, text in {"hang.py": HANG, "fork.py": FORK, "files.py": FILES, "types.py": TYPES, "tamper.py": TAMPER,
                       "syntax.py": "def f(:", "note.txt": "late", "alice/hw1.py": (folder / "submission-A.py").read_text()}.items():
        (submissions / name).parent.mkdir(parents=True, exist_ok=True)
        (submissions / name).write_text(text)
    grade.main(["submissions", "--seed=secret", "--only=gumbel_softmax,guidance", "--seconds=5", "--out_dir=grades"])
    with open("grades/grades.csv", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert {name: float(row["total"]) for name, row in rows.items()} == {
        "alice": 12, "hang": 0, "fork": 0, "files": 0, "types": 0, "tamper": 0, "syntax": 0, "note": 0}
    assert {name: row["look at"] for name, row in rows.items() if row["look at"]} == {
        "hang": "time", "fork": "os", "files": "_exit open os", "tamper": "far measures shape"}
    feedback = {name: Path("grades", name, "feedback.txt").read_text() for name in rows}
    for name, words in (
            ("hang", ("took more than 5 seconds", "can't allocate memory")),
            ("fork", ("may not do this: os.fork", "prints or writes too much")),
            ("tamper", ("ValueError: ?, in gumbel_softmax",)),
            ("files", ("may not write files", "your code ended the process")),
            ("types", ("returns str, not a tensor", "keep the arguments of the hand-out")),
            ("syntax", ("invalid syntax",)), ("note", ("hand in one file",)), ("alice", ("12 of 12 points",))):
        assert all(said in feedback[name] for said in words), feedback[name]
    results = {name: json.loads(Path("grades", name, "results.json").read_text()) for name in rows}
    assert results["alice"]["score"] == 12 and [t["max_score"] for t in results["alice"]["tests"]] == [6, 6]
    assert results["tamper"]["tests"][-1] == {"name": "look at", "score": 0, "max_score": 0, "visibility": "hidden",
                                              "output": "far measures shape"}
    assert {path.name for path in tmp_path.iterdir()} == {"submissions", "grades"}


def test_an_answer_that_ends_the_worker_too(tmp_path, monkeypatch):
    """It costs its own exercise; another worker takes the next."""
    started, workers = [], grade.queue.SimpleQueue()
    (tmp_path / "template").mkdir()
    (tmp_path / "answer.py").write_text("")
    monkeypatch.setattr(grade, "start_worker", lambda folder: started.append(1) or subprocess.Popen(
        [sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))  # ends at once
    workers.put(grade.start_worker(tmp_path))
    found = grade.tried(workers, tmp_path, tmp_path / "template", tmp_path / "answer.py")
    assert found == grade.nothing("your code ended the process") and len(started) == 2
    worker = workers.get()
    worker.kill()
    worker.wait()


def test_a_function_of_ones_own_must_be_inside(handed_out, monkeypatch):
    _, folder = handed_out
    sheet = json.loads((folder / "course" / "sheet.json").read_text())
    monkeypatch.setattr(check, "ROOT", folder)
    exercise = sheet["exercises"][-1]
    name, file = exercise["functions"][0], folder / f"{exercise['file']}.py"
    text, with_helper = file.read_text(), source.text_of(file.read_text(), name) + "\n    return helper(1)"
    file.write_text(source.with_function(text, name, with_helper) + "\n\ndef helper(x):\n    return x\n")
    try:
        with pytest.raises(UserError, match=f"{name} uses helper, which the hand-out's {file.name} does not have"):
            check.packed(sheet)
    finally:
        file.write_text(text)


def test_the_finished_repository_gets_all_points(tmp_path, capsys):
    """As `python course/check.py` does; and it draws."""
    check.main([f"--out_dir={tmp_path}", "gumbel_softmax,frechet"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "14 of 14 points" and len([*tmp_path.glob("*.png")]) == 2


@pytest.mark.parametrize("arguments, message", [
    (["--seed="], "--seed=WORD is needed"), (["--seed=1", "nowhere"], "nowhere is no folder"),
    (["--seed=1", "--set=C"], "there are A and B"), (["--seed=1", "--only=x"], "the exercises are gumbel_softmax")])
def test_grade_refuses(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        grade.main([f"--submissions={tmp_path}", "--set=A", "--only=", *arguments])


def test_sizes_and_commands():
    """Files are short; commands in the pages have settings that exist; links lead somewhere."""
    assert all(len(path.read_text().splitlines()) <= 450 for path in COURSE.glob("*.py"))
    page = (COURSE / "README.md").read_text()
    for script, arguments in re.findall(r"python course/(\w+)\.py(.*)", page):
        scope = vars({"make": make, "check": check, "grade": grade}[script])
        assert all(name in scope for name in re.findall(r"--(\w+)", arguments))
    assert all((COURSE / link).is_file() for link in re.findall(r"\]\((\w+\.\w+)\)", page))
