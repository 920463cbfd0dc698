import pytest
from scripts import run, start

from configurator import UserError, configure, is_default


def settings():
    return dict(lr=1e-3, steps=10, name="run", flag=False, mult=(1, 2), _hidden=3, CONSTANT=4, function=len)


def test_command_line_then_config_file_in_order(tmp_path):
    (tmp_path / "a.py").write_text('"""An experiment."""\nlr = 2  # a comment\nmult = (1, 2, 4)\nname = "b"\n')
    scope = settings()
    config = configure(scope, ["--lr=5", str(tmp_path / "a.py"), "--steps=1_000", "--flag=True"])
    assert config == dict(lr=2.0, steps=1000, name="b", flag=True, mult=(1, 2, 4))
    assert scope["lr"] == 2.0 and type(scope["lr"]) is float and scope["_hidden"] == 3


def test_strings_are_taken_as_they_are():
    assert configure(settings(), ["--name=1e-3"])["name"] == "1e-3"
    assert configure(settings(), ["--name="])["name"] == ""


def test_one_number_makes_a_tuple():
    assert configure(settings(), ["--mult=3"])["mult"] == (3,)


@pytest.mark.parametrize("argument, message", [
    ("--step=3", "no setting 'step'; the nearest is 'steps'"),
    ("--_hidden=3", "no setting '_hidden'"),
    ("--CONSTANT=3", "no setting 'CONSTANT'"),
    ("--steps=1.5", "steps takes an int such as 10, not 1.5"),
    ("--steps=True", "steps takes an int"),
    ("--steps=abc", "not 'abc'"),
    ("--flag=1", "flag takes a bool"),
    ("--mult=1,x", "mult takes a tuple"),
    ("--mult=(1,2.5)", "mult takes a tuple"),
    ("--lr", "written --name=value"),
    ("--lr=__import__('os').remove('x')", "lr takes a float"),
    ("nothing.py", "can't read the config file nothing.py"),
])
def test_mistakes(argument, message):
    scope = settings()
    with pytest.raises(UserError) as error:
        configure(scope, [argument])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert scope == settings()  # nothing half done


@pytest.mark.parametrize("text", ["import os", "lr = open('x')", "lr += 1", "a = b = 1", "lr = 10 ** 3", "lr =",
                                  "if True:\n    lr = 2", "scope.lr = 3", "\0"])
def test_config_files_hold_literals_only(tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match="bad.py"):
        configure(settings(), [str(tmp_path / "bad.py")])


def test_the_home_folder(tmp_path, monkeypatch):
    """~ at the start of a string, on the command line, in a config file and of its path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").write_text('name = "~/runs"\n')
    assert configure(settings(), ["~/a.py"])["name"] == f"{tmp_path}/runs"
    assert configure(settings(), ["--name=~"])["name"] == str(tmp_path)
    assert configure(settings(), ["--name=a~/~"])["name"] == "a~/~"
    for argument in ("--name=~nobody-here/runs", "~nobody-here/a.py"):
        with pytest.raises(UserError, match=r".*: no home folder is known for ~nobody-here; write the path in full$") as error:
            configure(settings(), [argument])
        assert str(error.value).startswith(argument)


@pytest.mark.parametrize("argument, message", [
    ("--steps=1" + 30 * "0", "a whole number can't be 2^62 or more"),
    ("--lr=1" + 400 * "0", "a whole number can't be 2^62 or more"),
    ("--mult=(1,-4611686018427387904)", "a whole number can't be 2^62 or more"),
    ("--mult={[1]: 2}", "mult takes a tuple"),
    ("--out_dir=", "--out_dir= names no folder: --out_dir=. is the current one"),  # else /stage1.pt is written
])
def test_values_that_can_not_be(argument, message):
    with pytest.raises(UserError) as error:
        configure(settings() | dict(out_dir="out"), [argument])
    assert message in str(error.value)


def test_a_config_file_of_windows(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbflr = 2\r\n")
    assert configure(settings(), [str(tmp_path / "a.py")])["lr"] == 2.0


def test_each_call_starts_from_the_defaults():
    """As in a notebook, which calls `main` again; a variable that was set by hand meanwhile stays."""
    scope = settings()
    configure(scope, ["--lr=5", "--steps=3"])
    assert (scope["lr"], scope["steps"]) == (5.0, 3)
    scope["name"] = "by hand"
    configure(scope, ["--steps=4"])
    assert (scope["lr"], scope["steps"], scope["name"]) == (settings()["lr"], 4, "by hand")


def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path):
    cases = (("train_stage1.py", "--lr=fast", "error: --lr=fast: lr takes a float"),
             ("sample.py", f"--out_dir={tmp_path}", "error: there is no checkpoint"),
             ("train_prior.py", f"--out_dir={tmp_path}", "error: there is no checkpoint"),
             ("data.py", "mnits", "error: mnits can't be downloaded"),
             ("data.py", "pets photos", "error: one name is wanted: `python data.py NAME"))
    for (*_, message), process in zip(cases, [start(script, *argument.split()) for script, argument, _ in cases]):
        printed, errors = process.communicate()
        assert process.returncode == 2 and errors.startswith(message) and errors.count("\n") == 1, errors
        assert not printed


def test_help_shows_the_settings():
    for script in ("train_stage1.py", "train_prior.py", "sample.py", "data.py", "compare_priors.py", "bench.py"):
        printed = run(script, "--help")
        assert "python " + script in printed
        assert "overwrite = False" in printed or script in ("sample.py", "compare_priors.py", "bench.py")
        assert "num_steps = 18" in printed or script != "sample.py"


def test_whether_a_setting_has_its_default():
    scope = settings()
    configure(scope, ["--lr=5", "--steps=10"])
    assert [is_default(scope, name) for name in ("lr", "steps", "mult")] == [False, True, True]
