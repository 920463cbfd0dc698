"""
Grades what students handed in: the files that `python course/check.py --pack` made.

    python course/grade.py submissions/ --seed=SECRET                            # set A
    python course/grade.py submissions/ --seed=SECRET --set=B --variant=1 --jobs=4

submissions/ holds a file per student, NAME.py, or a folder per student with one .py file in it. The set and
the variant are those of the hand-out. --seed is a word that students don't know: it decides the random
numbers of the checks.

Leaves in out_dir: grades.csv; for each student NAME/feedback.txt, and NAME/results.json in the form that
Gradescope's autograder wants.

From each file only the asked functions are taken. Each exercise runs in a process of its own, on a clean copy of the
code with the right answers to all other exercises, with a limit of time, memory and output; what it starts is
ended with it. An answer that hangs, prints floods, exits or returns the wrong type costs that student that
exercise. THIS IS NO SANDBOX: a student who wants to can read what you can read, send it elsewhere, or forge points.
Run it in a container without a network (course/README.md has the command), and read what is suspicious: the last
column of grades.csv names functions that use more than numerics needs.
"""

import csv
import json
import os
import queue
import shutil
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from check import report
from exercises import SETS, exercises
from make import files_of, solution, write
from source import Wrong, in_their_class, read_answer, suspicious, text_of

from configurator import configure, require

submissions = ""
set = "A"  # or B
variant = 0
seed = ""
out_dir = "grades"
only = ""  # names of exercises, separated by commas; empty: all
seconds = 60  # for one exercise
memory_gb = 4.0  # for one exercise, beyond what importing torch takes
jobs = 1  # exercises checked at once

LARGEST = 1 << 20  # bytes of a submission

# ----------------------------------------------------------------------------------------------------
# what was handed in


def handed_in(folder):
    """-> {student: file}, or {student: what is wrong}, of a folder of submissions"""
    students = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__")):
            continue
        files = [*entry.rglob("*.py")] if entry.is_dir() and not entry.is_symlink() else [entry]
        file = files[0] if len(files) == 1 else None
        name = entry.name if entry.is_dir() or entry.stem in students else entry.stem
        name += "_" * (name == "grades.csv")  # the table's name
        if file and file.suffix == ".py" and file.is_file() and not file.is_symlink() and file.stat().st_size < LARGEST:
            students[name] = file
        else:
            students[name] = "hand in one file, the .py file that `check.py --pack` makes"
    return students


def right_answers(texts, chosen):
    """What a student would hand in who has it all right."""
    return "\n\n".join(in_their_class(name, text_of(texts[f"{exercise.file}.py"], name))
                       for exercise in chosen for name in exercise.functions) + "\n"


# ----------------------------------------------------------------------------------------------------
# one answer, in a worker


def start_worker(folder):
    """A process that checks answers: worker.py, without a way to this repository."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8",
                   "PYTHONUSERBASE": site.getuserbase(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-B", str(folder / "worker.py")], cwd=folder, env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def tried(workers, folder, template, file):
    """One answer's checks, by the next idle worker, in a copy of the exercise's template in folder.

    -> {"results": [[property, complaint]], "says": words, "printed": text}, with no results where there are none
    """
    worker, tree = workers.get(), Path(tempfile.mkdtemp(dir=folder))
    try:
        shutil.copytree(template, tree, dirs_exist_ok=True)
        shutil.copyfile(file, tree / "submission.py")
        job = dict(folder=str(tree), submission=str(tree / "submission.py"), seed=seed, seconds=seconds,
                   memory=int(memory_gb * 2 ** 30))
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            ended = worker.stdout.readline().strip()
        except BrokenPipeError:
            ended = ""
        if not ended:  # the answer ended the worker too
            worker.kill()
            worker = start_worker(folder)
        ended_it = "your code ended the process"
        said = {"time": f"your code took more than {seconds} seconds", "done": ended_it, "": ended_it}
        found = as_written(read(tree / "result.json")) if ended == "done" else None
        found = found or nothing(said.get(ended, f"{ended_it}, exit code {ended}"))
        return found | {"printed": read(tree / "printed.txt", 300)}
    finally:
        workers.put(worker)
        shutil.rmtree(tree, ignore_errors=True)


def nothing(says):
    """What is found where nothing could be checked."""
    return {"results": [], "says": says, "printed": ""}


def read(path, most=1 << 20):
    """The beginning of a text file that a submission may have written or replaced, "" if there is none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return file.read(most).decode(errors="replace")
    except OSError:
        return ""


def as_written(text):
    """What worker.py writes, or None for anything else."""
    try:
        found = json.loads(text)
        results = [[str(says), printable(str(complaint))] for says, complaint in found["results"]]
        return {"results": results, "says": printable(str(found["says"]))}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------
# what is written


def graded(exercise, found, properties):
    """-> points, lines of feedback. properties: of this exercise, which the results must be about"""
    results = found["results"] if [says for says, _ in found["results"]] == properties else []
    points = exercise.points * sum(not complaint for _, complaint in results) / len(properties)
    lines = report(exercise._asdict(), points, results or [("it could be checked", "no")], found["says"])
    if points < exercise.points and found["printed"]:
        lines.append(f"     it printed: {found['printed']!r}")
    return points, lines


def printable(text):
    """Without control characters, and what UTF-8 can't write."""
    return "".join(c if c.isprintable() else "?" for c in text)


def harmless(text):
    """A name as a spreadsheet may show it: not as a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def suspicions(file):
    """What a submission uses that it should not need, in words; "" if nothing or if it can't be read."""
    try:
        return harmless(" ".join(suspicious(read_answer(file))))
    except Wrong:
        return ""


def write_student(name, chosen, outcomes, uses):
    """Feedback, and Gradescope's results.json, where the lecturer alone sees what is to be looked at.

    outcomes: [(points, lines)] of the exercises
    """
    total, most = sum(points for points, _ in outcomes), sum(exercise.points for exercise in chosen)
    text = "\n\n".join("\n".join(lines) for _, lines in outcomes) + f"\n\n{total:.4g} of {most} points\n"
    tests = [{"name": f"{exercise.number} {exercise.name}", "score": round(points, 2), "max_score": exercise.points,
              "output": "\n".join(lines)} for exercise, (points, lines) in zip(chosen, outcomes)]
    if uses:
        tests.append({"name": "look at", "score": 0, "max_score": 0, "output": uses, "visibility": "hidden"})
    results = {"score": round(total, 2), "output": f"{total:.4g} of {most} points", "tests": tests}
    write(Path(out_dir, name), {"feedback.txt": text, "results.json": json.dumps(results, indent=1)})
    return total


# ----------------------------------------------------------------------------------------------------
# the run


def main(argv=()):
    configure(globals(), [a if a.startswith("-") else f"--submissions={a}" for a in argv])
    require(os.name == "posix", "grade.py needs Linux or macOS: it limits processes")
    require(set in SETS, f"--set={set}: there are {' and '.join(SETS)}")
    require(submissions and Path(submissions).is_dir(), f"{submissions or 'submissions/'} is no folder of submissions")
    require(seed, "--seed=WORD is needed, one that students don't know")
    require(min(seconds, memory_gb, jobs) > 0, "seconds, memory_gb and jobs must be positive")
    chosen = exercises(set, variant)
    known = [exercise.name for exercise in chosen]
    require(not only or {*only.split(",")} <= {*known}, f"--only={only}: the exercises are {', '.join(known)}")
    chosen = [exercise for exercise in chosen if not only or exercise.name in only.split(",")]
    students = handed_in(Path(submissions))
    require(students, f"{submissions} has no submissions: one NAME.py of each student, or a folder NAME with it")
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder:
        grade_all(Path(folder), chosen, students)


def grade_all(folder, chosen, students):
    templates = {exercise.name: folder / f"template-{exercise.number}" for exercise in chosen}
    for exercise in chosen:
        write(templates[exercise.name], files_of(set, variant, [exercise]))
    shutil.copy(HERE / "worker.py", folder)
    (folder / "right.py").write_text(right_answers(solution(exercises(set, variant)), chosen), encoding="utf-8")
    workers = queue.SimpleQueue()
    started = [start_worker(folder) for _ in range(jobs)]
    for worker in started:
        workers.put(worker)

    def all_of(pool, file):
        return [pool.submit(tried, workers, folder, templates[exercise.name], file) for exercise in chosen]

    with ThreadPoolExecutor(jobs) as pool:
        properties = {}
        for exercise, future in zip(chosen, all_of(pool, folder / "right.py")):
            found = future.result()
            properties[exercise.name] = [says for says, _ in found["results"]]
            require(found["results"] and not found["says"],
                    f"the right answer to {exercise.number} fails: {found['says']}. Take another --seed, or more "
                    "--seconds and --memory_gb")
        futures = {name: all_of(pool, file) for name, file in students.items() if isinstance(file, Path)}
        rows = []
        for name, file in students.items():
            if name in futures:
                all_found = [future.result() for future in futures[name]]
            else:
                all_found = [nothing(file)] * len(chosen)
            outcomes = [graded(e, found, properties[e.name]) for e, found in zip(chosen, all_found)]
            uses, shown = suspicions(file) if name in futures else "", harmless(name)
            total = write_student(name, chosen, outcomes, uses)
            rows.append([shown, *(f"{points:.2f}" for points, _ in outcomes), f"{total:.2f}", uses])
            print(f"{shown}: {total:.4g}" + f", uses {uses}" * bool(uses), flush=True)
    while not workers.empty():
        worker = workers.get()
        worker.kill()
        worker.wait()
    with open(Path(out_dir, "grades.csv"), "w", newline="", encoding="utf-8") as file:
        heads = [f"{exercise.number} {exercise.name} ({exercise.points})" for exercise in chosen]
        csv.writer(file).writerows([["student", *heads, "total", "look at"], *rows])
    print(f"{out_dir}/grades.csv is ready, and {out_dir}/NAME/feedback.txt and results.json of {len(rows)} students. "
          "This was no sandbox: read what `look at` names")


if __name__ == "__main__":
    main(sys.argv[1:])
