"""What surrounds a run: locks, signals, progress, precision."""
import contextlib
import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import TINY, run, start

import run as runs
from checkpoint import atomic
from configurator import UserError, configure, out_of_memory


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Handlers, locks, hooks and PyTorch's precision, as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    runs.release()


# locks


def test_one_run_at_a_time(tmp_path, trained):
    """The second one says so and writes nothing; the file is gone afterwards."""
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    for script, product, settings in (("train_stage1.py", "stage1", [*TINY, "--overwrite=True"]),
                                      ("train_prior.py", "prior_ar", ["--device=cpu", "--overwrite=True"]),
                                      ("sample.py", "samples", ["--device=cpu", "--num_steps=2"])):
        runs.hold(f"{trained}/{product}")
        with pytest.raises(UserError, match=f"another run is writing {trained}/{product}: wait until it has ended"):
            run(script, f"--out_dir={trained}", *settings)
        assert not list(trained.glob("*.lock"))
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before


def test_a_killed_run_holds_nothing(tmp_path):
    folder, program, holds = tmp_path / "held", tmp_path / "holder.py", tmp_path / "holds"
    program.write_text("import pathlib, sys, time; sys.path.insert(0, '.'); import run; "
                       f"run.hold({str(folder / 'a')!r}); pathlib.Path({str(holds)!r}).touch(); time.sleep(60)")
    holder = start(program)
    while not holds.exists():
        assert holder.poll() is None
        time.sleep(0.001)
    with pytest.raises(UserError, match="another run"):
        runs.hold(folder / "a")
    runs.hold(folder / "b")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (folder / "a.lock").exists()
    runs.hold(folder / "a")
    runs.release(folder / "a")
    assert [p.name for p in folder.iterdir()] == ["b.lock"]


def test_without_locks_runs_go_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr(runs.fcntl, "flock", no_locks)
    runs.hold(tmp_path / "a")
    monkeypatch.setattr(runs, "fcntl", None)
    runs.hold(tmp_path / "b")
    (tmp_path / "file").write_text("")
    runs.hold(tmp_path / "file" / "c")
    assert not runs.held


# signals


def test_a_second_ctrl_c_ends_at_once_unless_it_is_the_same(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    came = runs.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 0.9
    os.kill(os.getpid(), signal.SIGINT)
    assert max(came) == signal.SIGINT and capfd.readouterr().err.count("Ctrl-C") == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert max(came) == signal.SIGTERM
    now[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number, said", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_exit_codes(capsys, number, said):
    with pytest.raises(SystemExit) as stop:
        runs.end(number, "8 images", "out/stage1.pt")
    assert stop.value.code == {"Ctrl-C": 130, "SIGTERM": 143}[said]
    line = f"stopped by {said} after 8 images, which out/stage1.pt has: the same command goes on from there\n"
    assert capsys.readouterr().out == line
    runs.end(0, "8 images", "out/stage1.pt")
    assert not capsys.readouterr().out


# what goes wrong, in one line


def hooked(error, capsys, **scope):
    """What the excepthook of a script with these globals says of an error, and the exit code."""
    configure(scope, [])
    with pytest.raises(SystemExit) as stop:
        sys.excepthook(type(error), error, None)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said[7:-1], stop.value.code


def test_out_of_memory_is_one_line(tmp_path, capsys):
    """Caused by a tensor, an array and Python's own; on a GPU it is another class."""
    (tmp_path / "stage1.pt").write_text("")
    caused = []
    for too_much in (lambda: torch.empty(2 ** 55), lambda: np.empty(2 ** 55), lambda: bytes(2 ** 55)):
        try:
            too_much()
        except Exception as error:
            caused.append(error)
    assert len(caused) == 3
    for error in (*caused, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")):
        assert out_of_memory(error)
        assert hooked(error, capsys, batch_gpu=64, batch_size=512, _checkpoint_path=str(tmp_path / "stage1.pt")) == (
            f"out of memory: a smaller --batch_gpu may help; it is 64. {tmp_path}/stage1.pt is untouched", 2)
        assert hooked(error, capsys, batch_size=512, _checkpoint_path="nothing.pt") == (
            "out of memory: a smaller --batch_size may help; it is 512", 2)
        assert hooked(error, capsys, workers=3) == ("out of memory", 2)
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(OSError("not enough memory cards"))


def test_a_training_script_without_memory(tmp_path):
    """With 8 GB of addresses, a batch whose noise takes 25: the checkpoint of the beginning stays."""
    folder, program = tmp_path / "run", tmp_path / "limited.py"
    program.write_text("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (8 * 2 ** 30,) * 2); sys.argv.pop(0); "
                       "sys.path.insert(0, '.'); runpy.run_path('train_stage1.py', run_name='__main__')")
    process = start(program, "train_stage1.py", f"--out_dir={folder}", *TINY, "--coarse_images=0", "--batch_size=8000000")
    _, errors = process.communicate()
    assert process.returncode == 2 and errors == (
        "error: out of memory: a smaller --batch_gpu may help; it is 512, 512 images at once. "
        f"{folder}/stage1.pt is untouched\n")
    assert torch.load(folder / "stage1.pt")["step"] == 0
    assert {p.name for p in folder.iterdir()} == {"stage1.pt", "stage1.jsonl"}


@contextlib.contextmanager
def read_only(*folders):
    """Nobody, not even root, may write there or delete what is in there."""
    user = os.geteuid()
    for folder in folders:
        folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize("script, product, settings", [
    ("train_stage1.py", "stage1.pt", [*TINY, "--save_every=8"]),
    ("train_prior.py", "prior_ar.pt", ["--layers=1", "--dim=16", "--heads=2", "--batch_size=50", "--total_images=200",
                                       "--save_every=50", "--device=cpu"]),
    ("sample.py", "samples.parts/000000002.npz", ["--num_images=4", "--batch_size=2", "--num_steps=2", "--device=cpu"])])
def test_a_folder_that_becomes_read_only_or_vanishes(trained, tmp_path, monkeypatch, capsys, script, product, settings):
    """In mid-run: one line that says so; training begins the folder anew."""
    folder, enter = tmp_path / "run", atomic.__enter__
    for vanishes in (False, True):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("samples*", product, "*.previous.pt"))
        with contextlib.ExitStack() as stack, monkeypatch.context() as patched:
            def harm(self):  # when the second part of the samples is to be written, or the second checkpoint
                if self.path == folder / product and (self.path.exists() or script == "sample.py"):
                    shutil.rmtree(folder) if vanishes else stack.enter_context(read_only(self.path.parent))
                return enter(self)

            patched.setattr(atomic, "__enter__", harm)
            if vanishes and script != "sample.py":
                run(script, f"--out_dir={folder}", *settings)
                assert torch.load(folder / product)["step"] > 1
                continue
            with pytest.raises((UserError, OSError)) as error:
                run(script, f"--out_dir={folder}", *settings)
        capsys.readouterr()
        assert hooked(error.value, capsys, out_dir=str(folder)) == (
            f"can't read or write {folder}/samples.parts/000000000.npz: No such file or directory" if vanishes else
            f"can't write {folder / product}: Permission denied", 2)
        assert vanishes or script == "sample.py" or torch.load(folder / product)["step"] == 0


def test_a_folder_that_went_away_is_one_line(tmp_path, capsys):
    for path in (tmp_path / "samples.parts" / "settings.json", tmp_path):
        assert hooked(OSError(30, "Read-only file system", str(path)), capsys, out_dir=str(tmp_path)) == (
            f"can't read or write {path}: Read-only file system", 2)
    configure(dict(out_dir=str(tmp_path)), [])
    error = FileNotFoundError(2, "No such file or directory", "/elsewhere")  # our mistake: its traceback
    sys.excepthook(FileNotFoundError, error, None)
    assert capsys.readouterr().err.startswith("FileNotFoundError: ")


def test_names_that_are_too_long_or_break_lines(capsys):
    """The line stays one, and nothing in a name reaches the terminal as more than text."""
    error = OSError(errno.ENAMETOOLONG, "File name too long", "xx")
    assert hooked(error, capsys) == ("can't read or write xx: File name too long", 2)
    assert hooked(UserError("there is no a\nb\x1b[31m\udcff \u65e5\u672c"), capsys) == (
        r"there is no a\nb\x1b[31m\udcff" + " \u65e5\u672c", 2)


def test_what_can_not_be_printed_is_escaped():
    program = "from configurator import configure; configure({}, []); print('\\u65e5\\udcff')"
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, env=ascii_alone)
    assert (done.returncode, done.stdout.split()) == (0, [rb"\u65e5\udcff"]), done


def test_output_that_nobody_reads(tmp_path):
    """stdout is closed by `head`: one line. Both are closed from the beginning: the run goes on."""
    program = "import os; from configurator import configure; configure({}, []); "
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", program + "print(1, flush=True)"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "error: the program that reads this output has ended, as `head` does: "
                                                 "write the output to a file instead\n")
    program += f"from run import progress; print(len([*progress([1, 2])]), file=open({str(tmp_path / 'a')!r}, 'w'))"
    assert subprocess.run(["sh", "-c", f"{sys.executable} -c \"$0\" >&- 2>&-", program], cwd=ROOT).returncode == 0
    assert (tmp_path / "a").read_text() == "2\n"


# progress


def test_progress_is_plain_lines_without_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    bar = runs.progress(total=400, unit="img", initial=0, mininterval=0)
    for _ in range(400):
        now[0] += 1  # a second an image
        bar.update(1)
        bar.set_postfix({"loss": "0.5000"})
    bar.close()
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 8 and lines[-1] == "" and "\r" not in "".join(lines)
    assert [line.split("%")[0].strip() for line in lines[:-1]] == ["15", "30", "45", "60", "75", "90", "100"]
    assert all(", loss=0.5000]" in line and "img/s" in line for line in lines[:-1]) and lines[-2].startswith("100%| 400/400 [")
    assert list(runs.progress([1, 2, 3], desc="of three")) == [1, 2, 3]
    assert capsys.readouterr().err.startswith("of three: 100%| 3/3 [")
    assert list(runs.progress([1, 2, 3], leave=False)) == [1, 2, 3] and list(runs.progress([1], disable=True)) == [1]
    with pytest.raises(ZeroDivisionError):
        for i in runs.progress([1, 0]):
            1 / i
    assert not capsys.readouterr().err


def test_progress_in_a_terminal_is_tqdms(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert type(runs.progress([1])) is runs.tqdm and list(runs.progress([1, 2])) == [1, 2]
    assert "\r" in capsys.readouterr().err


# precision


@pytest.mark.parametrize("precision, dtype, matmul, tf32", [
    ("bf16", torch.bfloat16, "high", True), ("fp16", torch.float16, "high", True), ("tf32", None, "high", True),
    ("fp32", None, "highest", False)])
def test_precision_on_a_gpu(monkeypatch, capsys, precision, dtype, matmul, tf32):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: (device, dtype))
    found = runs.set_precision(precision, torch.device("cuda"))
    assert found == ("cuda", dtype) if dtype else isinstance(found, contextlib.nullcontext)
    assert torch.get_float32_matmul_precision() == matmul and torch.backends.cudnn.allow_tf32 == tf32
    assert not capsys.readouterr().err


def test_what_a_gpu_lacks_is_said_and_done_without(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert isinstance(runs.set_precision("bf16", torch.device("cuda")), contextlib.nullcontext)
    assert capsys.readouterr().err == "this GPU has no bfloat16: the run goes on in float32. --precision=fp16 is faster\n"
    for triton, capability, why in ((True, (7, 0), ""), (None, (9, 0), "Triton is not installed"),
                                    (True, (6, 1), "this GPU is too old for Triton")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert runs.can_compile(torch.device("cuda")) == (not why)
        said = capsys.readouterr().err
        assert said == (f"torch.compile can't be used, since {why}: the run goes on without it, more slowly\n" if why else "")


def test_a_cpu_computes_in_float32(capsys):
    before = torch.get_float32_matmul_precision()
    for precision in ("bf16", "fp16", "tf32", "fp32"):
        assert isinstance(runs.set_precision(precision, torch.device("cpu")), contextlib.nullcontext)
    assert torch.get_float32_matmul_precision() == before and not runs.can_compile(torch.device("cpu"))
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="--precision is bf16, fp16, tf32 or fp32, not int8"):
        runs.set_precision("int8", torch.device("cpu"))
