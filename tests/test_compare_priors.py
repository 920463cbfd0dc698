"""The table of the priors; distances between codes where they are known."""
import shutil

import pytest
import torch
from scripts import PRIOR, run

from compare_priors import distances, shuffled_in_class
from configurator import UserError


def test_compare_priors(trained, tmp_path):
    shutil.copy(trained / "stage1.pt", tmp_path)
    bits = {}
    for kind, name in (("ar", "AR"), ("sedd", "SEDD, first-hitting")):
        table = run("train_prior.py", f"--out_dir={tmp_path}", *PRIOR, f"--prior={kind}", "--total_images=100")
        bits[name] = [line for line in table.splitlines() if line.startswith("  this prior, given the class")][0][37:].split()[0]
    settings = [f"--out_dir={tmp_path}", "--num_codes=300", "--batch_size=128", "--sedd_steps=4", "--etas=0.1,", "--device=cpu"]
    printed = run("compare_priors.py", *settings, "--samples=2")
    assert (tmp_path / "compare_priors.txt").read_text() in printed and (tmp_path / "compare_priors.png").stat().st_size > 1000
    rows = {line[:36].strip(): line[36:].replace("+-", "").split() for line in printed.splitlines()[2:-1]}
    assert list(rows) == ["real codes (the floor)", "independent latents given the class", "AR", "SEDD, first-hitting",
                          "SEDD, analytic, 3 steps", "SEDD, analytic, 4 steps", "and remasking, eta = 0.1"]
    assert [row[-6] for row in list(rows.values())[2:]] == ["3", "3", "3", "4", "4"]  # evaluations
    assert all(0 < float(v) < 1 for row in rows.values() for v in (row[-4], row[-2]))
    floor, ar = rows["real codes (the floor)"], rows["AR"]
    assert float(ar[-4]) > 1.5 * float(floor[-4])  # a prior after two steps is no good, and that shows
    for name, said in bits.items():
        assert float(said) == pytest.approx(float(rows[name][-8]), abs=0.02), name
    for changes, message in ((["--etas=1.0,"], "etas are probabilities below 1"), (["--sedd_steps=0"], "sedd_steps must be positive"),
                             (["--out_dir=/nowhere"], "there is no checkpoint")):
        with pytest.raises(UserError, match=message):
            run("compare_priors.py", *settings, *changes)


def test_distances_between_codes():
    """Total variation where it is known: z_2 = z_1 against independent ones, both uniform; and shuffling undoes pairs."""
    equal, every = torch.tensor([[0, 0], [1, 1]]), torch.cartesian_prod(torch.arange(2), torch.arange(2))
    assert distances(equal, every, k=2) == (0, 0.5)
    assert distances(torch.tensor([[0, 0]]), torch.tensor([[1, 0]]), k=2) == (0.5, 1)
    codes, labels = equal.repeat(4000, 1), torch.zeros(8000, dtype=torch.int64)
    labels[:4000] = 1
    codes[labels == 1] += 2
    shuffled = shuffled_in_class(codes, labels, torch.Generator().manual_seed(0))
    single, pairs = distances(codes, shuffled, k=4)
    assert single == 0 and pairs == pytest.approx(0.5, abs=0.02) and (shuffled[labels == 1] >= 2).all()
