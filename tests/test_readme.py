"""README, docs/ and config/ say what is there: files, names, settings, links, pictures."""
import ast
import itertools
import math
import re
import shlex
import sys

import pytest
from conftest import ROOT
from PIL import Image

from configurator import configure

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAPER_MAP = PAGES["docs/paper_map.md"]


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


def settings_of(script):
    """The settings of a script: its globals that are literals, up to its first function or class."""
    settings = {}
    body = ast.parse((ROOT / script).read_text()).body
    for node in itertools.takewhile(lambda node: not isinstance(node, (ast.FunctionDef, ast.ClassDef)), body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = math.inf if ast.unparse(node.value) == "math.inf" else ast.literal_eval(node.value)
            except ValueError:
                continue
            settings[node.targets[0].id] = value
    return settings


def blocks(page):
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```", PAGES[page], re.S | re.M)


def tables(text):
    """The rows of a page's tables, as lists of cells, without heads."""
    lines = re.sub(r"^\|.*\n\| ---.*\n", "", text, flags=re.M).splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")]


def test_sizes():
    assert len(README.encode()) <= 9 * 1024
    for path in (*ROOT.glob("*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("tests/*.py")):
        assert len(path.read_text().splitlines()) <= 450, path.name


# ----------------------------------------------------------------------------------------------------
# tables

ROWS = [row for row in tables(PAPER_MAP) if not row[0].startswith("`")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_names_what_exists(row):
    if row[2] == "not here":
        assert not re.search("`", "".join(row[3:]))
        return
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


@pytest.mark.parametrize("paper, kind, count", [
    ("DisCo-Diff", "Alg.", 3), ("DisCo-Diff", "Eq.", 4), ("DisCo-Diff", "Table", 5), ("DisCo-Diff", "Fig.", 17),
    ("Discrete Latent Codes", "Eq.", 5), ("Discrete Latent Codes", "Table", 7), ("Discrete Latent Codes", "Fig.", 12)])
def test_the_paper_map_leaves_nothing_out(paper, kind, count):
    """All numbers of a kind are in the first column, as in "Fig. 3", "Figs. 11, 12, 14", "Tables 4 to 7"."""
    found = set()
    for section in re.findall(rf"^## {paper}.*?(?=^## |\Z)", PAPER_MAP, re.S | re.M):
        for first, *_ in tables(section):
            for numbers in re.findall(rf"{kind.rstrip('.')}s?\.? ([\d, ]+(?:to \d+)?)", first):
                low, _, high = numbers.partition("to")
                listed = [int(number) for number in re.findall(r"\d+", low)]
                found |= set(listed) | set(range(listed[-1], int(high or listed[-1]) + 1))
    assert found == set(range(1, count + 1))


@pytest.mark.parametrize("page", ["README.md", "docs/paper_map.md"])
def test_rows_name_what_exists(page):
    """In every row of every table, names in backticks are in one of the row's files."""
    for row in tables(PAGES[page]):
        quoted = re.findall(r"`([\w./]+)`", " ".join(row))
        files = [word for word in quoted if word.endswith(".py")]
        for file in files:
            assert (ROOT / file).is_file(), f"{row[0]}: there is no {file}"
        names = {word for word in quoted if not word.endswith(".py")}
        missing = names - set().union(*map(names_in, files), {file.removesuffix(".py") for file in files})
        assert not missing, f"{row[0]}: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_anywhere_exist(page):
    for file in set(re.findall(r"[\w/]*\w\.py\b", PAGES[page])) - {"dataset_tool.py"}:  # EDM's
        assert (ROOT / file).is_file(), file


# ----------------------------------------------------------------------------------------------------
# commands


def test_the_two_commands_are_single_lines():
    for heading in ("Run", "Test"):
        block = re.search(rf"^## {heading}\n.*?```\w*\n(.*?)```", README, re.S | re.M)[1]
        assert len(block.strip().splitlines()) == 1 and "pip install -r requirements.txt" in block


COMMANDS = [(page, command.strip()) for page in PAGES for block in blocks(page)
            for line in block.replace("\\\n", " ").splitlines() for command in line.split("&&")
            if re.match(r" *(python (?!-)|torchrun )", command)]


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda text: text)
def test_commands_fit_their_script(page, command, monkeypatch):
    """The script is there, its arguments are its settings, with values of the right type, and its config files are there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    words = shlex.split(command, comments=True)
    (place, script), = [(i, word) for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)][:1]
    arguments = [word for word in words[place + 1:] if word != "--help"]
    if script == "data.py":
        arguments = [word if word.startswith("--") else f"--name={word}" for word in arguments]
    configure(settings_of(script), arguments)


def test_commands_are_found():
    assert {("README.md", "python sample.py"), ("README.md", "python toy2d.py --quick=True")} < set(COMMANDS)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_page_begins_with_its_command(page):
    assert re.match(r"(python|torchrun) ", blocks(page)[0])


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_config_files_fit_their_script(path):
    kinds = {"encoder": "train_encoder.py", "llada": "train_text.py", "text": "train_text.py", "prior": "train_prior.py", "restart": "sample.py", "sample": "sample.py"}
    script = kinds.get(path.stem.split("_")[-1]) or \
        kinds.get(path.stem.split("_")[0].rstrip("0123456789"), "train_stage1.py")
    assert configure(settings_of(script), [str(path)])["out_dir"].startswith("out" if script == "sample.py" else "out/")


def test_the_python_example(tmp_path, monkeypatch):
    """The README's ```python block, line by line as it stands there."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")  # the example is run in the repository's folder
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    picture = Image.open(tmp_path / "out" / "python.png")
    assert picture.width == 10 * picture.height and picture.getextrema()[0] < 10 and picture.getextrema()[1] > 240


# ----------------------------------------------------------------------------------------------------
# links and pictures


def anchors(text):
    """Those of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_images_are_there(page):
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGES[page]):
        assert min(Image.open((ROOT / page).parent / image).size) > 100


def test_every_page_is_linked_from_the_readme():
    assert all(page in README for page in PAGES if page != "README.md")
