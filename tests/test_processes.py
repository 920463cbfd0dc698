"""Several processes do what one does."""
import json
import re
import shutil

import pytest
import torch
from conftest import checkpoint
from scripts import PRIOR, TINY, outputs, run, start_together

from coarse import CoarseDenoiser
from configurator import UserError, arguments_of
from model import DisCoDiff
from processes import start_processes

COUNTED = """
import runpy, sys, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, ".")
exchanges, init = [], DistributedDataParallel.__init__
def hooked(self, *arguments, **options):
    init(self, *arguments, **options)
    def hook(state, bucket):
        exchanges.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)
    self.register_comm_hook(None, hook)
DistributedDataParallel.__init__ = hooked
sys.argv.pop(0)
runpy.run_path("train_stage1.py", run_name="__main__")
print(f"{sum(exchanges)} numbers exchanged")
"""


def test_processes_and_accumulation_change_nothing(tmp_path):
    """One step after the encoder's first phase: Adam's first moment is 0.1 times the gradient of the whole batch.
    Then the weights after ten, and the logs.

    Two processes take four micro-steps each, and exchange gradients after the last of them alone: counted
    by a hook that stands for the exchange. The phase takes two steps.
    """
    (tmp_path / "counted.py").write_text(COUNTED)
    for images in (8, 80):
        settings = [*TINY, "--encoder_lr=5e-5", "--log_every=8", f"--total_images={images}", "--overwrite=True"]
        two = start_together(2, tmp_path / "counted.py", "train_stage1.py", f"--out_dir={tmp_path / 'two'}", *settings,
                             "--batch_gpu=1")
        run("train_stage1.py", f"--out_dir={tmp_path / 'one'}", *settings)
        run("train_stage1.py", f"--out_dir={tmp_path / 'micro'}", *settings, "--batch_gpu=2")
        printed = "".join(out for out, _ in outputs(two))
        state = checkpoint(tmp_path / "two")
        model, args = DisCoDiff(**state["model_args"]), arguments_of(state["model_args"], CoarseDenoiser)
        weights, of_phase = (sum(p.numel() for p in net.parameters()) for net in (model, CoarseDenoiser(model.encoder, **args)))
        assert re.findall(r"(\d+) numbers exchanged", printed) == [str(images // 8 * weights + 2 * of_phase)] * 2
        if images == 8:
            gradients = {name: [s["exp_avg"] for s in checkpoint(tmp_path / name)["optimizer"]["state"].values()]
                         for name in ("one", "micro", "two")}
            largest = max(g.abs().max() for g in gradients["one"])
            for name in ("micro", "two"):
                for a, b in zip(gradients["one"], gradients[name], strict=True):
                    assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7 * largest
    begin, one, micro, two = (torch.cat([p.flatten() for p in checkpoint(tmp_path / name, file)["model"].values()]) for name, file in (
        ("one", "stage1.previous.pt"), ("one", "stage1.pt"), ("micro", "stage1.pt"), ("two", "stage1.pt")))
    assert (one - begin).norm() > 0.5
    for other in (micro, two):
        apart = (other - one).abs()  # Adam divides by the gradient's size: where that is nothing but rounding, so is the step
        assert apart.quantile(0.99) < 1e-6 and apart.norm() < 0.01 * (one - begin).norm()
    logs = {name: [json.loads(line) for line in open(tmp_path / name / "stage1.jsonl")] for name in ("one", "micro", "two")}
    for name in ("micro", "two"):
        for a, b in zip(logs["one"], logs[name], strict=True):
            assert a["images"] == b["images"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-3)
            assert a["bits"] == pytest.approx(b["bits"], rel=1e-2, abs=1e-3)


def test_processes_change_nothing_for_the_priors(tmp_path, trained):
    for prior in ("ar", "sedd"):
        settings = [*PRIOR, f"--prior={prior}", "--total_images=200"]
        for name in ("one", "two"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(trained / "stage1.pt", tmp_path / name)
        processes = start_together(2, "train_prior.py", f"--out_dir={tmp_path / 'two'}", *settings)
        run("train_prior.py", f"--out_dir={tmp_path / 'one'}", *settings)
        outputs(processes)
        one, two = (checkpoint(tmp_path / name, f"prior_{prior}.pt") for name in ("one", "two"))
        moved = False
        for name, p in one["model"].items():
            assert torch.allclose(p, two["model"][name], atol=1e-4), name
            moved = moved or (p - one["ema"][name]).abs().max() > 1e-5
        assert moved


def test_a_batch_that_processes_can_not_share(tmp_path):
    for process in start_together(3, "train_stage1.py", f"--out_dir={tmp_path}", *TINY):
        _, errors = process.communicate()
        assert process.returncode and "error: batch_size 8 can't be shared among 3 processes equally\n" in errors
        assert "train_stage1.py\", line" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a GPU of Apple's")
def test_apples_gpus_are_for_one_process_and_for_macs(monkeypatch):
    with pytest.raises(UserError, match="--device=mps can't be used here: it is for Apple's GPUs"):
        start_processes("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device=mps is for one process: 2 can't work together there"):
        start_processes("mps")
