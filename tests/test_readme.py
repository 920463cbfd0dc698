"""The README and config/ say what is there."""
import ast
import math
import re

import pytest
from PIL import Image

from configurator import configure
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def names_in(file):
    """Functions, classes, methods and globals of a Python file."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{n.name}" for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


ROWS = [[cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in README.splitlines() if re.match(r"\| (DisCo-Diff|EDM|ADM|DLC|SEDD|Restart)", line)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_names_what_exists(row):
    files = re.findall(r"`([\w/]+\.py)`", row[2])
    assert files and all((ROOT / file).is_file() for file in files)
    have = set().union(*map(names_in, files))
    names = re.findall(r"`([\w.]+)`", row[3]) if len(row) > 3 else []
    assert set(names) <= have and (names or files[0].startswith("config/"))
    for comment in re.findall(r'under "([^"]+)"', row[-1]):
        assert f"\n# {comment}" in (ROOT / files[0]).read_text()


def test_the_table_covers_the_papers():
    text = " ".join(row[0] for row in ROWS)
    assert all(word in text for word in ("Alg. 1", "Alg. 2", "Alg. 3", "Eq. 3", "Eq. 4", "App. B", "Fig. 7", "sec. 3.3", "App. F"))


def test_the_two_commands_are_single_lines():
    for heading in ("Run", "Test"):
        block = re.search(rf"^## {heading}\n.*?```\w*\n(.*?)```", README, re.S | re.M)[1]
        assert len(block.strip().splitlines()) == 1 and "pip install -r requirements.txt" in block


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_config_files_fit_their_script(path):
    script = "train_prior.py" if path.stem.endswith("_prior") else "sample.py" if path.stem.startswith("restart") \
        else "train_stage1.py"
    settings = ast.parse((ROOT / script).read_text().split("\n# ------")[0].split("\nconfig = configure(")[0])
    scope = {node.targets[0].id: math.inf if ast.unparse(node.value) == "math.inf" else ast.literal_eval(node.value)
             for node in settings.body if isinstance(node, ast.Assign)}
    assert configure(scope, [str(path)])["out_dir"].startswith("out" if script == "sample.py" else "out/")


def test_images_are_there():
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert min(Image.open(ROOT / image).size) > 100
