"""Prompts of sample.py: rows, seeds, compositions, mistakes."""
import shutil

import numpy as np
import pytest
import torch
from conftest import checkpoint, close, load
from scripts import SAMPLE, TEXT, outputs, run, start_together

from configurator import UserError

PROMPTS = "--prompt=a dark coat|an ankle boot"


def test_rows_of_prompts(written, tmp_path):
    """Two codes of a prompt in each row of the grid, then the next prompt; the class is the one that the model writes.
    The same from a file, in other batches, from two processes, and for some of the images."""
    folder = written[0]
    printed = run("sample.py", f"--out_dir={folder}", *SAMPLE, PROMPTS)
    assert printed.startswith("20 images, 5 evaluations each\n5 codes in ")
    made = load(folder)
    assert made["prompts"].tolist() == ["a dark coat"] * 8 + ["an ankle boot"] * 8 + ["a dark coat"] * 4
    rows = made["codes"].reshape(5, 4, 3)
    assert (rows == rows[:, :1]).all() and len({tuple(row[0]) for row in rows}) > 1
    assert made["codes"].max() < 5 and 0 <= made["labels"].min() and made["labels"].max() < 10
    (tmp_path / "prompts.txt").write_bytes("\ufeffa dark coat\r\nAN ankle boot\n".encode())
    arguments = ["sample.py", f"--init_from={folder}", f"--prompt_file={tmp_path / 'prompts.txt'}", *SAMPLE]
    outputs(start_together(2, *arguments, f"--out_dir={tmp_path}", "--batch_size=12"))
    assert close(made, load(tmp_path))
    run(*arguments, f"--out_dir={tmp_path}", "--name=one", "--num_images=4", "--seed=8")
    assert np.array_equal(load(tmp_path, "one")["codes"], made["codes"][8:12])
    run("sample.py", f"--out_dir={folder}", *SAMPLE, PROMPTS, "--per_code=1", "--name=each")
    assert load(folder, "each")["prompts"].tolist() == ["a dark coat", "an ankle boot"] * 10


def test_settings_of_the_sampler(written):
    """Each changes the codes; temperature 0 in the model's order has no randomness; a composition has the prompt's code."""
    folder, found = written[0], {}
    for name, settings in {"plain": [], "cold": ["--temperature=0"], "random": ["--text_order=random"],
                           "two": ["--text_steps=2"], "blocks": ["--text_block=1"], "guided": ["--text_guidance=9"]}.items():
        run("sample.py", f"--out_dir={folder}", *SAMPLE, "--prompt=a dark coat", "--per_code=1", f"--name={name}", *settings)
        found[name] = load(folder, name)["codes"]
    assert (found["cold"] == found["cold"][0]).all()
    assert all(not np.array_equal(found["plain"], codes) for name, codes in found.items() if name != "plain")
    run("sample.py", f"--out_dir={folder}", *SAMPLE, "--prompt=a dark coat", "--per_code=1", "--compose=1,2,3", "--name=mixed")
    mixed = load(folder, "mixed")
    fours = mixed["codes"].reshape(5, 4, 3)
    assert np.array_equal(fours[:, 0], found["plain"][:5]) and (fours[:, 1] == [1, 2, 3]).all()
    assert np.logical_or(fours[:, 2:] == fours[:, :1], fours[:, 2:] == [1, 2, 3]).all()
    assert (mixed["prompts"] == "a dark coat").all()


@pytest.mark.parametrize("arguments, message", [
    (["--prompt= "], "prompt 1 of --prompt= is empty|prompt 1 of --prompt=  is empty"),
    (["--prompt="], "--prompt= is empty: say what to draw"),
    (["--prompt=a|"], "prompt 2 of --prompt=a| is empty: say what to draw"),
    (["--prompt=\udcff"], "has bytes that are no UTF-8"),
    (["--prompt=" + 65 * "a"], "has 65 tokens, and this model reads 64 at most"),
    (["--prompt=" + 9999 * "a"], "the prompt 'a{99} has 9999 tokens"),
    (["--prompt_file=nowhere.txt"], "can't read nowhere.txt: No such file"),
    (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file both give codes: choose one"),
    (["--prompt=a", "--code=1,2,3"], "--code and --prompt both give codes: choose one"),
    (["--prompt=a", "--class_label=2"], "a prompt says what to draw: leave class_label and random_labels out"),
    (["--prompt=a", "--random_labels=True"], "a prompt says what to draw: leave class_label and random_labels out"),
    (["--prompt=a", "--text_steps=5"], "text_steps is 5: it must be 1 at least, a step for each block, and 4 at most"),
    (["--prompt=a", "--text_steps=1", "--text_block=2"], "text_steps is 1: it must be 2 at least"),
    (["--prompt=a", "--text_order=left"], "--text_order is low-confidence or random, not left"),
    (["--prompt=a", "--eta=0.1", "--sedd_sampler=analytic"], "is for --prior=sedd"),
    (["--prompt=a", "--text_block=-1"], "text_steps and text_block can't be negative"),
    (["--text_steps=2"], "text_steps is for --prompt")])
def test_bad_prompts(written, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        run("sample.py", f"--out_dir={written[0]}", *SAMPLE, *arguments)
    assert "\n" not in str(error.value)


def test_prompts_that_get_no_image_are_counted(written, tmp_path, capsys):
    """Of a file whose first line has a separator that is no line break."""
    path = tmp_path / "prompts.txt"
    path.write_text("a\u2028coat\na bag\na dress")
    for settings, images, prompts, wanted in ((["--per_code=4"], 20, 3, ""), (["--per_code=4"], 16, 2, 24),
                                              (["--per_code=7"], 20, 2, 42), (["--per_code=1"], 3, 3, ""),
                                              (["--per_code=4", "--compose=1,2,3"], 20, 2, 48)):
        run("sample.py", f"--out_dir={tmp_path}", f"--init_from={written[0]}", *SAMPLE, f"--prompt_file={path}", *settings,
            f"--num_images={images}")
        assert len({*load(tmp_path)["prompts"]}) == prompts
        said = [line for line in capsys.readouterr().err.splitlines() if "prompts" in line]
        assert said == [f"images of {prompts} of 3 prompts: --num_images={wanted} has all"] * bool(wanted)


def test_files_of_prompts(written, tmp_path):
    path = tmp_path / "prompts.txt"
    for content, message in ((b"", "line 1 of .*prompts.txt is empty|is empty"), (b"a\n\nb", "line 2 of .*prompts.txt is empty"),
                             (b"a\xe9", "prompts.txt is not text in UTF-8: its byte 1 is 0xe9")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            run("sample.py", f"--out_dir={written[0]}", *SAMPLE, f"--prompt_file={path}")


def test_a_model_without_text_and_codes_that_changed(trained, written, tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint .*text.pt: run `python train_text.py --out_dir="):
        run("sample.py", f"--out_dir={trained}", *SAMPLE, "--prompt=a coat")
    shutil.copy(written[0] / "text.pt", tmp_path)
    stage1 = checkpoint(trained)
    stage1["ema"]["encoder.norm.weight"] += 0.1
    torch.save(stage1, tmp_path / "stage1.pt")
    with pytest.raises(UserError, match="text.pt was trained on codes of another stage 1 than .*: run `python train_text.py"):
        run("sample.py", f"--out_dir={tmp_path}", *SAMPLE, "--prompt=a coat")
    with pytest.raises(UserError, match="text.pt is of another stage 1 than .*stage1.pt: start anew with --overwrite=True"):
        run("train_text.py", f"--out_dir={tmp_path}", *TEXT, "--total_images=200", "--change=total_images")
