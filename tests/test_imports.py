"""Every file of ours can be imported, as in a notebook: that defines things, and does nothing else."""
from conftest import ROOT, checkpoint, close, load, same, same_training
from scripts import SAMPLE, TINY, outputs, run, start

PROGRAM = """
import importlib, os, random, signal, sys, threading, time
import numpy, torch
closed, root, *modules = sys.argv[1:]
sys.path.insert(0, root)
if closed == "closed":  # as by >&- 2>&-
    os.close(1), os.close(2)
    sys.stdout = sys.stderr = None


def state():
    return (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(), sys.excepthook,
            os.getcwd(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], threading.active_count(),
            torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(), dict(os.environ))


before, began = state(), time.process_time()
for module in modules:
    importlib.import_module(module)
    if state() != before:
        sys.exit(f"{module} changes something when it is imported")
if time.process_time() - began > 3:
    sys.exit(f"it took {time.process_time() - began} seconds")
"""


def test_importing_defines_things_only(tmp_path):
    """No output, no files, no randomness drawn, no handler set, nothing slow; and stdout may be closed."""
    modules = sorted(path.stem for path in ROOT.glob("*.py"))
    assert {"train_stage1", "train_prior", "sample", "toy2d"} < {*modules}
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "empty").mkdir()
    for process in [start(tmp_path / "program.py", how, ROOT, *modules, cwd=tmp_path / "empty") for how in ("open", "closed")]:
        printed, errors = process.communicate()
        assert (process.returncode, printed, errors) == (0, "", "")
    assert not list((tmp_path / "empty").iterdir())


NOTEBOOK = """
import signal, sys
tiny, prior, samples, out, root = map(str.split, sys.argv[1:])
(out,), root = out, sys.path.insert(0, root[0])
import run, sample, train_prior, train_stage1
from configurator import UserError

handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
train_stage1.main([*tiny, f"--out_dir={out}/plain", "--num_latents=0", "--dropout=0.5", "--lr=0.5", "--total_images=8"])
train_stage1.main([*tiny, f"--out_dir={out}"])
for mistake in ("--lr=fast", "--lr=0.5"):
    try:
        train_stage1.main([*tiny, f"--out_dir={out}", mistake])
        sys.exit(f"{mistake} was taken")
    except UserError:
        pass
train_stage1.main([*tiny, f"--out_dir={out}"])
train_prior.main([*prior, f"--out_dir={out}", "--prior=sedd", "--seed=1"])
train_prior.main([*prior, f"--out_dir={out}"])
sample.main([*samples, f"--out_dir={out}", "--name=other", "--class_label=2", "--code=1,2,3", "--guidance=2"])
sample.main([*samples, f"--out_dir={out}"])
assert not run.held and handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
"""


def test_a_notebook_calls_main_more_than_once(trained, tmp_path):
    """The second call has nothing of the first one's settings, nor of a mistake's; locks and handlers are as before."""
    prior = ["--layers=1", "--dim=16", "--heads=2", "--total_images=500", "--device=cpu"]
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    (printed, _), = outputs([start(tmp_path / "notebook.py", *map(" ".join, (TINY, prior, SAMPLE)), tmp_path, ROOT)])
    assert printed.count("stage1.pt is finished") == 1
    for file in ("stage1.pt", "prior_ar.pt"):
        assert same_training(checkpoint(trained, file), checkpoint(tmp_path, file))
    assert not same(checkpoint(trained, "prior_sedd.pt")["model"], checkpoint(tmp_path, "prior_sedd.pt")["model"])
    run("sample.py", f"--out_dir={trained}", "--name=script", *SAMPLE)
    assert close(load(trained, "script"), load(tmp_path)) and (load(tmp_path, "other")["labels"] == 2).all()
