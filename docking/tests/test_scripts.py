"""The scripts, from complexes to ranked poses, with networks of a few steps."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import docking.tests.published  # noqa: F401  # skips where RDKit is missing
from configurator import UserError
from docking import confidence, data, dock, toy_pocket, train, train_prior
from docking.complexes import Chem, read_protein

ROOT = Path(train.__file__).resolve().parent.parent
TINY = ["--device=cpu", "--dataset=tiny", "--scalars=4", "--vectors=2", "--encoder_vectors=2", "--total_poses=16",
        "--batch_size=4", "--log_every=8", "--save_every=8"]
PDB, SDF = (str(ROOT / f"docking/shipped/5l87/5l87_{part}") for part in ("protein_processed.pdb", "ligand.sdf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained stage 1, prior and confidence model of two complexes."""
    place = tmp_path_factory.mktemp("docking")
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "HERE", place / "docking")
    patch.setattr(sys, "excepthook", sys.excepthook)
    (place / "ids.txt").write_text("5l87\n3ptb\nnothing\n")
    data.main([f"--source={ROOT}/docking/shipped", f"--ids={place}/ids.txt", "--name=tiny", "--crop=10", "--most=4"])
    train.main([f"--out_dir={place}", *TINY])
    train_prior.main([f"--out_dir={place}", "--device=cpu", "--total_poses=16", "--held_poses=8", "--batch_size=4"])
    patch.setattr(dock, "num_steps", 2)
    confidence.main([f"--out_dir={place}", "--device=cpu", "--total_poses=8", "--batch_size=4", "--poses_each=2"])
    yield place
    patch.undo()


def test_what_is_left_behind(folder):
    names, complexes = data.load("tiny")
    assert names == ["5l87", "3ptb"] and all(abs(c.rec_pos.mean()) < 1e-4 for c in complexes)
    for name in ("stage1", "prior", "confidence"):
        assert (folder / f"{name}.pt").exists()
    lines = [json.loads(line) for line in (folder / "stage1.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16] and 0.3 < lines[-1]["loss"] < 3
    assert 0 < lines[-1]["code_bits"] <= 7


def test_a_stopped_run_continues_to_the_same_weights(folder, tmp_path):
    train.main([f"--out_dir={tmp_path}", *TINY, "--total_poses=8"])
    train.main([f"--out_dir={tmp_path}", *TINY])
    a, b = (torch.load(place / "stage1.pt") for place in (folder, tmp_path))
    assert a["step"] == b["step"] == 4 and all(torch.equal(a["ema"][key], b["ema"][key]) for key in a["ema"])
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_the_prior_starts_as_the_denoiser_and_holds_it(folder, tmp_path):
    stage1 = torch.load(folder / "stage1.pt")
    (tmp_path / "stage1.pt").write_bytes((folder / "stage1.pt").read_bytes())
    train_prior.main([f"--out_dir={tmp_path}", "--device=cpu", "--total_poses=8", "--held_poses=8", "--batch_size=4"])
    held, freed = (torch.load(place / "prior.pt")["model"] for place in (tmp_path, folder))
    weights = [key for key in held if key.startswith("net.") and "running" not in key]
    assert all(torch.equal(held[key], stage1["ema"][f"score.{key}"]) for key in weights)
    assert any(not torch.equal(freed[key], held[key]) for key in weights)


def test_docking_a_smiles(folder, capsys):
    arguments = [f"--out_dir={folder}", f"--protein={PDB}", "--ligand=NCCCC(=O)O", "--num_samples=3", "--num_steps=2",
                 "--device=cpu"]
    dock.main([*arguments, "--name=one"])
    mols = list(Chem.SDMolSupplier(str(folder / "one.sdf")))
    assert [mol.GetProp("rank") for mol in mols] == ["1", "2", "3"] and mols[0].GetNumAtoms() == 7
    sure = [float(mol.GetProp("confidence")) for mol in mols]
    assert sure == sorted(sure, reverse=True) and mols[0].GetProp("codes").count(";") == 1
    names = {f"atom {i + 1} ({element})" for i, element in enumerate("NCCCCOO")} | {*read_protein(PDB)[2]}
    assert {name for mol in mols for name in mol.GetProp("codes").split("; ")} <= names
    dock.main([*arguments, "--name=two", "--batch_size=1"])  # the same poses, one at a time
    other = list(Chem.SDMolSupplier(str(folder / "two.sdf")))
    for a, b in zip(mols, other):
        assert abs(a.GetConformer().GetPositions() - b.GetConformer().GetPositions()).max() < 0.01
    capsys.readouterr()


def test_redocking_with_the_true_pose(folder, capsys):
    dock.main([f"--out_dir={folder}", f"--protein={PDB}", f"--truth={SDF}", "--num_samples=2", "--num_steps=2",
               "--name=true", "--device=cpu"])
    assert "RMSD" in capsys.readouterr().out and (folder / "true.png").exists()


def test_the_table_of_a_data_set(folder, capsys):
    dock.main([f"--out_dir={folder}", "--dataset=tiny", "--num_samples=2", "--num_steps=2", "--name=all",
               "--device=cpu"])
    printed = capsys.readouterr().out
    assert all(f"\n{kind}" in printed for kind in dock.KINDS)
    found = json.loads((folder / "all.json").read_text())
    assert [row["id"] for row in found["oracle"]] == ["5l87", "3ptb"] and len(found["prior"][0]["rmsd"]) == 2
    assert (folder / "all_5l87.png").exists()


def test_the_toy(tmp_path, capsys):
    """A table and a picture; what is measured is kept, and what is missing comes out the same."""
    arguments = [f"--out_dir={tmp_path}", "--copies=(2,)", "--steps=2", "--batch_size=2", "--num_samples=2",
                 "--num_steps=2"]
    toy_pocket.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    runs, table = results["runs"], (tmp_path / "table.txt").read_text()
    assert [run["label_size"] for run in runs] == [0, 5] and len(runs[1]["points_at"]) == 2
    assert 0 <= runs[1]["bits"] <= 1 and (tmp_path / "pocket.png").exists() and len(table.splitlines()) == 3
    (tmp_path / "results.json").write_text(json.dumps(results | {"runs": runs[1:]}))
    toy_pocket.main(arguments)
    again = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert again == [runs[1], runs[0]] and (tmp_path / "table.txt").read_text() == table
    with pytest.raises(UserError, match="with another steps"):
        toy_pocket.main([*arguments, "--steps=3"])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        toy_pocket.main(arguments)
    capsys.readouterr()


# ----------------------------------------------------------------------------------------------------
# mistakes


def test_a_damaged_data_set_that_ships_is_prepared_again(folder, monkeypatch):
    path = folder / "datasets/docking/shipped-one.pt"
    (folder / "docking/shipped").mkdir(parents=True)
    (folder / "docking/shipped/one.txt").write_text("5l87")
    (folder / "docking/shipped/5l87").symlink_to(ROOT / "docking/shipped/5l87")
    monkeypatch.setitem(data.SHIPPED, "shipped-one", ("one.txt", 10.0, 4))
    path.write_bytes(b"half a file")
    names, complexes = data.load("shipped-one")
    assert names == ["5l87"] and data.identity(complexes) == data.identity(data.load("tiny")[1][:1])


def test_other_complexes_of_the_same_name(folder, tmp_path, monkeypatch):
    """Prepared again with another crop, a data set is not that of stage 1."""
    content = torch.load(folder / "datasets/docking/tiny.pt")
    content["complexes"][0][1]["residues"][0] += 1
    (tmp_path / "datasets/docking").mkdir(parents=True)
    torch.save(content, tmp_path / "datasets/docking/tiny.pt")
    monkeypatch.setattr(data, "HERE", tmp_path / "docking")
    for script, error in ((train_prior, "not what stage 1"), (confidence, "not what stage 1")):
        with pytest.raises(UserError, match=error):
            script.main([f"--out_dir={folder}", "--device=cpu", "--overwrite=True"])
    with pytest.raises(UserError, match="other complexes than tiny"):
        train.main([f"--out_dir={folder}", *TINY])


def test_a_crop_without_residues(folder):
    with pytest.raises(UserError, match="can be used"):
        data.main([f"--source={ROOT}/docking/shipped", f"--ids={folder}/ids.txt", "--name=none", "--crop=0.1"])


@pytest.mark.parametrize("arguments, error", [
    (["--ligand=CC"], "give --protein and --ligand, or --dataset"), ([f"--protein={PDB}"], "give the ligand too"),
    ([f"--protein={SDF}", "--ligand=CC"], "has no protein"), ([f"--protein={PDB}", "--ligand=C"], "two heavy atoms"),
    ([f"--protein={PDB}", "--ligand=C1CC"], "RDKit can't read"), (["--dataset=unknown"], "no data set unknown"),
    ([f"--protein={PDB}", "--ligand=CC", f"--truth={SDF}"], "different molecules"),
    ([f"--protein={PDB}", "--truth=NCCCC(=O)O"], "has no positions"), (["--dataset=tiny", "--tau=()"], "three numbers"),
    (["--dataset=tiny", "--tau=(0.0,1.0,1.0)"], "tau must be positive"), (["--dataset=tiny", "--name=a/b"], "folders"),
    (["--dataset=tiny", "--psi=(0.0,0.0,1e999)"], "all finite")])
def test_one_line_says_what_is_wrong(folder, arguments, error):
    with pytest.raises(UserError, match=error):
        dock.main([f"--out_dir={folder}", "--device=cpu", *arguments])


def test_a_checkpoint_of_other_features(folder, tmp_path):
    state = torch.load(folder / "stage1.pt")
    torch.save(state | {"features": [1, 2]}, tmp_path / "stage1.pt")
    with pytest.raises(UserError, match="other features"):
        dock.main([f"--out_dir={tmp_path}", "--dataset=tiny", "--device=cpu"])


def test_no_checkpoint_yet(tmp_path):
    with pytest.raises(UserError, match="run `python docking/train.py"):
        dock.main([f"--out_dir={tmp_path}", "--dataset=tiny", "--device=cpu"])


def test_without_rdkit_one_line_says_what_to_install(tmp_path):
    (tmp_path / "rdkit.py").write_text("raise ImportError\n")
    done = subprocess.run([sys.executable, "docking/dock.py"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.strip() == "error: docking needs RDKit: pip install -r docking/requirements.txt"
