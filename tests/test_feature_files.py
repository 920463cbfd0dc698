"""Features of any network, from a file; where results are kept."""
import json

import numpy as np
import pytest
import torch
from conftest import moments
from scripts import run

from configurator import UserError
from feature_files import reserved
from metrics import equally_many, frechet_distance, kernel_distance, precision_recall

rng = np.random.default_rng(0)


# another network's features


@pytest.fixture
def given(tmp_path, monkeypatch):
    """given(arrays, arguments) -> what eval_fid.py finds of an .npz of these, and what it prints"""
    def evaluate(arrays, *arguments):
        np.savez(tmp_path / "dino.npz", **arrays)
        printed = run("eval_fid.py", f"--features={tmp_path / 'dino.npz'}", "--images=nowhere.npz",
                      "--reference=nowhere", *arguments)
        return json.loads((tmp_path / "dino.features.json").read_text()), printed
    return evaluate


def test_features_from_a_file(given, monkeypatch):
    real, generated = rng.integers(-9, 9, (40, 5)), rng.integers(-8, 10, (60, 5))
    found, printed = given(dict(real=real, generated=generated))
    assert found["FD"] == pytest.approx(frechet_distance(*moments(real), *moments(generated))) and "FID" not in found
    pair = equally_many(torch.from_numpy(real), torch.from_numpy(generated))
    assert [len(x) for x in pair] == [40, 40] and (found["precision"], found["recall"]) == precision_recall(*pair)
    assert (found["KID"], found["KID se"]) == kernel_distance(*pair)
    assert found["protocol"].endswith("equally many: 40 of each side")
    assert (found["count"], found["real_count"]) == (60, 40) and "60 rows" in printed and "40 of real" in printed
    for title in ("FD", "precision", "recall", "KID"):
        assert f"\n{title:24}{found[title]:10.4g}" in printed
    assert "warning" not in printed and "dino.features.json is ready" in printed
    for dtype in ("float16", "float32", ">f8", "int8"):
        same = dict(real=real.astype(dtype), generated=np.asfortranarray(generated.astype(dtype)))
        assert given(same | dict(other=np.array([{}])))[0] == found
    assert "10 of each side" in given(dict(real=real, generated=generated), "--manifold_images=10")[0]["protocol"]
    found, printed = given(dict(real=rng.normal(size=(4, 5)), generated=rng.normal(size=(9, 5))))
    assert printed.count("warning: 4 rows of real are fewer than the 5 dimensions") == printed.count("warning") == 1
    assert given(dict(real=real[:, :1], generated=real[:, :1]))[0]["FD"] == 0


@pytest.mark.parametrize("arrays, words", [
    (dict(real=None), "it has generated, not real"), (dict(generated=None, a=1), "it has real, a, not generated"),
    (dict(real=None, generated=None), "it has nothing, not real and generated"),
    (dict(real=np.zeros(9)), r"real float64 \(9,\)"),
    (dict(generated=np.zeros((9, 2, 3))), r"generated float64 \(9, 2, 3\)"), (dict(real=np.zeros((9, 0))), r"\(9, 0\)"),
    (dict(real=np.zeros((9, 4))), "4 dimensions in real, 3 in generated"),
    (dict(real=np.full((9, 3), np.nan)), "NaN, infinity .* in real"),
    (dict(generated=np.full((9, 3), -np.inf, np.float16)), "NaN, infinity .* in generated"),
    (dict(real=np.full((9, 3), 1e200)), "1e50"),
    (dict(real=np.zeros((3, 3))), "3 rows of real: 4 or more"), (dict(real=np.array([[{}]])), "Object arrays"),
    (dict(generated=np.zeros((9, 3), complex)), "complex128"), (dict(real=np.array([["a"] * 3] * 9)), "<U1")])
def test_odd_features_are_refused(given, arrays, words):
    arrays = dict(real=np.ones((9, 3)), generated=np.ones((9, 3))) | arrays
    with pytest.raises(UserError, match=words) as error:
        given({key: value for key, value in arrays.items() if value is not None})
    assert "\n" not in str(error.value)


def test_features_that_are_no_file_are_refused(given, tmp_path):
    with pytest.raises(UserError, match="none.npz is not an .npz with features.*No such file"):
        run("eval_fid.py", f"--features={tmp_path / 'none.npz'}")
    (tmp_path / "text.npz").write_text("features")
    with pytest.raises(UserError, match="text.npz is not an .npz with features"):
        run("eval_fid.py", f"--features={tmp_path / 'text.npz'}")
    with pytest.raises(UserError, match="--self_check.*features alone"):
        given(dict(real=np.ones((9, 3)), generated=np.ones((9, 3))), "--self_check=True")


# what is kept


def test_what_is_kept_is_begun_by_one_run_where_it_can_be_written(tmp_path):
    """Both are told before the classifier is trained, and before the data set is measured."""
    path = tmp_path / "busy" / "a.npz"
    with reserved(path), pytest.raises(UserError, match="another run is writing .*busy/a.npz: wait"):
        reserved(path).__enter__()
    assert not list((tmp_path / "busy").iterdir())
    (tmp_path / "file").write_text("")
    words = "can't write .*, where what is computed on a data set is kept: make it writable"
    with pytest.raises(UserError, match=words):
        reserved(tmp_path / "file" / "features" / "a.npz").__enter__()  # nobody can make a folder there
