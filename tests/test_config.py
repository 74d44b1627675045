"""config.py: precedence, messages that name the place, types, round trip, the record of a run."""

import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import limited
from pydantic import ValidationError, model_validator

import config as config_module
from config import (
    Config,
    ConfigError,
    DiskFull,
    append,
    describe_run,
    opt,
    to_yaml,
    write_run_record,
    write_whole,
)

ROOT = Path(config_module.__file__).parent


class Tiny(Config):
    model: str = opt("some/model", "Hub id or folder")
    learning_rate: float = opt(1e-6, "AdamW step size", gt=0)
    steps: int = opt(10, "updates", ge=1)
    group: int = opt(2, "completions per prompt", ge=2, le=64)
    sampler: Literal["vllm", "hf", "off"] = opt("vllm", "the engine that generates")
    resume: Literal["auto", "no"] | None = opt(None, "checkpoint to continue from")
    dry_run: bool = opt(False, "explain and exit")
    clip: float | None = opt(None, "gradient norm", gt=0)
    betas: tuple[float, float] = opt((0.9, 0.999), "AdamW decay rates")
    names: tuple[str, ...] = opt((), "a list of words")
    columns: dict[str, str] = opt({}, "your name of each column")

    @model_validator(mode="after")
    def _check(self):
        if self.steps % self.group:
            raise ValueError(f"steps ({self.steps}) must be a multiple of group ({self.group})")
        return self


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes text to tiny.yaml in the working folder and returns that name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="tiny.yaml"):
        Path(name).write_text(text)
        return name

    return write


def errors(*argv, cls=Tiny):
    with pytest.raises(ConfigError) as caught:
        cls.load(argv)
    return str(caught.value).split("\n")


# ---- precedence ----


def test_defaults_then_files_in_order_then_command_line(file):
    first = file("learning_rate: 2e-6\nsteps: 4\nmodel: first\n", "first.yaml")
    second = file("steps: 6\nmodel: second\n", "second.yaml")
    loaded = Tiny.load([first, second, "model=last"])
    assert (loaded.group, loaded.learning_rate, loaded.steps, loaded.model) == (2, 2e-6, 6, "last")


def test_no_arguments_are_the_defaults_and_sys_argv_is_read(monkeypatch):
    assert Tiny.load([]) == Tiny()
    monkeypatch.setattr(sys, "argv", ["train.py", "steps=20"])
    assert Tiny.load().steps == Tiny.parse_args().steps == 20


def test_an_equals_sign_in_a_path_is_no_override(file, tmp_path):
    (tmp_path / "lr=1").mkdir()
    assert Tiny.load([file("steps: 8\n", "./lr=1/a.yaml")]).steps == 8


def test_empty_file_and_comments_change_nothing(file):
    assert Tiny.load([file("# nothing\n\n")]) == Tiny.load([file("")]) == Tiny()


# ---- mistakes ----


def test_unknown_key_names_place_and_nearest_key(file):
    path = file("# comment\nsteps: 4\n\nlearnig_rate: 1e-5\n")
    assert errors(path) == ["tiny.yaml:4: unknown key 'learnig_rate'; did you mean 'learning_rate'?"]
    assert errors("learnig_rate=1") == [
        "command line: learnig_rate=1: unknown key 'learnig_rate'; did you mean 'learning_rate'?"
    ]
    assert errors("xyzzy=1") == ["command line: xyzzy=1: unknown key 'xyzzy'"]


def test_repeated_key(file):
    assert errors(file("steps: 4\nmodel: a\nsteps: 4\n")) == [
        "tiny.yaml:3: repeated key 'steps', first given at tiny.yaml:1"
    ]
    assert sorted(errors(file("steps: 4\nsteps: x\nsteps: 4\ngrup: 2\n"))) == [
        "tiny.yaml:2: repeated key 'steps', first given at tiny.yaml:1",
        "tiny.yaml:3: repeated key 'steps', first given at tiny.yaml:1",
        "tiny.yaml:4: unknown key 'grup'; did you mean 'group'?",
    ]
    path = file("model: a\ncolumns:\n  image: a\n  image: b\n")
    assert errors(path) == ["tiny.yaml:4: repeated key 'image'"]


def test_of_a_key_repeated_on_the_command_line_the_last_counts_and_a_line_says_so(file, capsys, monkeypatch):
    path = file("steps: 4\n")
    argv = ["steps=many", path, "model=a", "steps=6", path, "steps=8"]
    assert Tiny.load(argv).steps == 8
    assert capsys.readouterr().err == "command line: steps=8: the last of 3 values for steps counts\n"
    assert Tiny.load(["steps=4", "names=[a]", "names=[b, c]"]).names == ("b", "c")
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")  # one process of several says it
    assert Tiny.load(["clip=1", "clip=null"]).clip is None and not capsys.readouterr().err
    assert errors("steps=4", "steps=x") == ["command line: steps=x: steps: expected int >= 1, got x"]
    assert errors("stesp=4", "stesp=4") == [
        "command line: stesp=4: unknown key 'stesp'; did you mean 'steps'?"
    ]


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefg"))


@pytest.mark.parametrize("text, message", [
    (BOMB, "tiny.yaml:2: alias *a of a list or mapping: write it out"),
    ("names: &a [*a]\n", "tiny.yaml:1: alias *a of a list or mapping: write it out"),
    ("columns: &a {image: *a}\n", "tiny.yaml:1: alias *a of a list or mapping: write it out"),
    ("model: &a {id: b}\ncolumns:\n  <<: *a\n", "tiny.yaml:3: alias *a of a list or mapping: write it out"),
    ("names: *a\n", "tiny.yaml:1: alias *a of a list or mapping: write it out"),
    ("names: " + "[" * 50_000, "tiny.yaml:1: too deep: write it out"),
    ("names: " + "[" * 21 + "]" * 21, "tiny.yaml:1: too deep: write it out"),
    ("names:\n" + "- " * 40_000, "tiny.yaml:2: too deep: write it out"),
    ("columns: " + "{a: " * 20_000, "tiny.yaml:1: too deep: write it out"),
    ("? " * 40_000, "tiny.yaml:1: too deep: write it out"),
    ("# " * 50_001, "tiny.yaml: expected at most 100000 characters"),
    ("? [a, b]\n: 3\n", "tiny.yaml:1: expected a key, got a sequence"),
    ("columns:\n  {a: b}: 3\n", "tiny.yaml:2: expected a key, got a mapping"),
    ("model: a\x07b\n", "tiny.yaml: unacceptable character #x0007: special characters are not"),
    ("steps: " + "9" * 9000, "tiny.yaml:1: steps: expected int >= 1, got " + "9" * 100 + " ..."),
    ('steps: "a\\nb"\n', "tiny.yaml:1: steps: expected int >= 1, got a b"),
    ('"ste\\nps": 4\n', "tiny.yaml:1: unknown key 'ste ps'"),
])  # fmt: skip
def test_hostile_files_are_one_line(text, message, file):
    started = time.process_time()
    (line,) = errors(file(text)) if text is not BOMB else errors(file(text))[:1]
    assert line.startswith(message) and len(line) < 300
    assert time.process_time() - started < 2
    if text.startswith(("names: [", "columns: {")):  # the same on the command line
        (line,) = errors(text.strip().replace(": ", "=", 1))
        assert message.partition(": ")[2] in line and len(line) < 300


def test_aliases_of_scalars_are_read(file):
    assert Tiny.load([file("steps: &n 4\ngroup: *n\n")]).group == 4


# ---- paths ----


class Paths(Config):
    data: str = opt("user/data", "Hub id or folder", path=True)
    val_data: str | None = opt(None, "the same, or none", path=True)
    out: Path = opt(Path("runs"), "folder", path=True)
    note: str = opt("", "any text")


@pytest.mark.parametrize("text, path", [
    ("~/sets", "/home/me/sets"), ("~", "/home/me"), ("$SETS/a", "/mnt/sets/a"), ("${SETS}/a", "/mnt/sets/a"),
    ("a/$SETS_/b", "a/x/b"), ("user/data", "user/data"), ("a~b/c$", "a~b/c$"), ("$TILDE", "/home/me/t"),
    ("vg:~/sets", "vg:/home/me/sets"),
])  # fmt: skip
def test_paths_are_written_out(text, path, file, monkeypatch):
    for name, value in {"HOME": "/home/me", "SETS": "/mnt/sets", "SETS_": "x", "TILDE": "~/t"}.items():
        monkeypatch.setenv(name, value)
    quoted = f'"{text}"'
    keys = "data", "val_data", "out", "note"
    lines = "".join(f"{key}: {quoted}\n" for key in keys)
    for argv in ([f"{key}={quoted}" for key in keys], [file(lines)]):
        got = Paths.load(argv)
        assert (got.data, got.val_data, got.out, got.note) == (path, path, Path(path), text)
        assert Paths.load([file(to_yaml(got))]) == got
    assert text == "~" or Paths.load([f"data={text}"]).data == path  # unquoted, `~` alone is YAML's null
    assert Paths(data=text, out=Path(text)).out == Path(path)


def test_a_file_may_have_a_dollar_in_its_name(tmp_path, monkeypatch):
    (tmp_path / "5$NOT_SET.jpg").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Paths(data="x", out=tmp_path / "5$NOT_SET.jpg").out.exists()
    assert Paths(data="x", out=Path("~/5$NOT_SET.jpg")).out.exists()


@pytest.mark.parametrize("text, message", [
    ("", "expected a path, got ''"), ("  ", "expected a path, got ''"), ("$NOT_SET/a", "$NOT_SET is not"),
    ("a/${NOT_SET}", "${NOT_SET} is not set"), ("$EMPTY", "expected a path, got '$EMPTY'"),
    ("~nobody_of_that_name/a", "expected a path, got '~nobody"), ("vg:~nobody_of_that_name", "a path"),
    ("\\0", "expected a path"),
])  # fmt: skip
def test_paths_that_lead_nowhere_are_refused_in_one_line(text, message, file, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    for key in ("data", "val_data"):
        (line,) = errors(f'{key}="{text}"', cls=Paths)
        assert line.startswith("command line: ") and f": {key}: " in line and message in line
        (line,) = errors(file(f'note: a\n{key}: "{text}"\n'), cls=Paths)
        assert line.startswith(f"tiny.yaml:2: {key}: ") and message in line
    assert errors("data=", cls=Paths) == ["command line: data=: data: expected str, got null"]
    assert Paths.load(["val_data="]).val_data is None


@pytest.mark.parametrize("module, name", [
    ("train_grpo", "GRPOConfig"), ("train_sft", "SFTConfig"), ("synthesize", "SynthesizeConfig"),
])  # fmt: skip
def test_every_key_that_may_be_a_path_is_one(module, name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cls = getattr(importlib.import_module(module), name)
    words = ("folder", "file", "Hub id", "data set of")
    keys = [k for k, f in cls.model_fields.items() if any(word in f.description for word in words)]
    assert {"out"} < set(keys)
    for key in keys:
        if key not in ("columns", "budget", "shuffle", "revision", "push_to_hub", "public"):
            value = "vg:~/a" if key == "source" else "~/a"
            assert getattr(cls.load([f"{key}={value}"]), key) == value.replace("~", "/home/me"), key


@pytest.mark.parametrize(
    "token, expected",
    [
        ("steps=many", "int >= 1"),
        ("steps=1.5", "int >= 1"),
        ("steps=0", "int >= 1"),
        ("steps=", "int >= 1"),
        ("model=null", "str"),
        ("steps=true", "int >= 1"),
        ("group=65", "int >= 2 and <= 64"),
        ("learning_rate=true", "float > 0"),
        ("learning_rate=-1", "float > 0"),
        ("learning_rate=nan", "a finite float > 0"),
        ("learning_rate=inf", "a finite float > 0"),
        ("clip=0", "float > 0 or null"),
        ("dry_run=2", "bool"),
        ("sampler=tgi", "'vllm' | 'hf' | 'off'"),
        ("resume=maybe", "'auto' | 'no' or null"),
        ("names=a", "tuple[str, ...]"),
        ("betas=[0.9]", "tuple[float, float]"),
        ("columns=x", "dict[str, str]"),
    ],
)
def test_ill_typed_value_names_expected_and_got(token, expected, file):
    key, value = token.split("=")
    got = value or "null"
    assert errors(token) == [f"command line: {token}: {key}: expected {expected}, got {got}"]
    path = file(f"# the second line is wrong\n{key}: {value}\n")
    assert errors(path) == [f"tiny.yaml:2: {key}: expected {expected}, got {got}"]


def test_all_mistakes_are_reported_at_once(file):
    path = file("stesp: 4\ngroup: 1\nclip: high\n")
    assert sorted(errors(path, "modle=x", "--steps=3", "missing.yaml")) == sorted(
        [
            "tiny.yaml:1: unknown key 'stesp'; did you mean 'steps'?",
            "tiny.yaml:2: group: expected int >= 2 and <= 64, got 1",
            "tiny.yaml:3: clip: expected float > 0 or null, got high",
            "command line: modle=x: unknown key 'modle'; did you mean 'model'?",
            "command line: unknown option '--steps=3'; settings are written key=value",
            "missing.yaml: cannot read: No such file or directory",
        ]
    )


def test_a_check_between_keys_comes_through_and_waits_for_other_mistakes():
    assert errors("steps=5") == ["steps (5) must be a multiple of group (2)"]
    assert errors("steps=5", "grop=5") == ["command line: grop=5: unknown key 'grop'; did you mean 'group'?"]


def test_required_key():
    class Needs(Config):
        data: Path = opt(..., "folder of parquet files")

    assert errors(cls=Needs) == ["missing key 'data' (folder of parquet files)"]
    assert errors("dta=x", cls=Needs) == ["command line: dta=x: unknown key 'dta'; did you mean 'data'?"]
    assert Needs.load(["data=x"]).data == Path("x")


@pytest.mark.parametrize(
    "text, message",
    [
        ("- steps\n", "tiny.yaml:1: expected a mapping (`key: value` lines), got a sequence"),
        ("\nsteps\n", "tiny.yaml:2: expected a mapping (`key: value` lines), got a scalar"),
        ("steps: 4\nmodel: a: b\n", "tiny.yaml:2: mapping values are not allowed here"),
        ("steps: [4\n", "tiny.yaml:2: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_broken_files(text, message, file):
    assert errors(file(text)) == [message]


def test_unreadable_files(file, tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert errors("latin.yaml")[0].startswith("latin.yaml: cannot read: 'utf-8' codec")
    assert errors(str(tmp_path)) == [f"{tmp_path}: cannot read: Is a directory"]


def test_a_bad_default_is_found():
    class Bad(Config):
        steps: int = opt(0, "updates", ge=1)

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Bad()


# ---- types ----


@pytest.mark.parametrize(
    "token, value",
    [
        ("learning_rate=1e-6", 1e-6),
        ("learning_rate=3", 3.0),
        ("steps=4", 4),
        ("steps='4'", 4),
        ("steps=10.0", 10),
        ("steps=010", 10),
        ("dry_run=true", True),
        ("dry_run=no", False),
        ("clip=null", None),
        ("clip=~", None),
        ("clip=.5", 0.5),
        ("resume=no", "no"),
        ("sampler=off", "off"),
        ("model=007", "007"),
        ("model=2024-01-01", "2024-01-01"),
        ("model=12:30", "12:30"),
        ("model='null'", "null"),
        ("names=[no, 1e-6]", ("no", "1e-6")),
        ("betas=[0.9, 1e-1]", (0.9, 0.1)),
        ("columns={image: on}", {"image": "on"}),
    ],
)
def test_scalars_are_read_as_the_declared_type(token, value, file):
    key, _, text = token.partition("=")
    for argv in ([token], [file(f"{key}: {text}\n")]):
        loaded = getattr(Tiny.load(argv), key)
        assert loaded == value and type(loaded) is type(value)


def test_text_on_the_command_line_is_literal():
    assert Tiny.load(["model=a: b # c"]).model == "a: b # c"
    assert Tiny.load(["model=*.json=1"]).model == "*.json=1"


@pytest.mark.parametrize(
    "values",
    [
        dict(steps=True),
        dict(learning_rate=True),
        dict(clip=False),
        dict(steps=2.5),
        dict(model=3),
        dict(learning_rate=float("nan")),
        dict(stesp=1),
    ],
)
def test_construction_in_python_is_checked_too(values):
    with pytest.raises(ValidationError):
        Tiny(**values)


def test_frozen():
    loaded = Tiny()
    with pytest.raises(ValidationError, match="frozen"):
        loaded.steps = 4


# ---- round trip and record ----

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(
    learning_rate=positive,
    clip=st.none() | positive,
    model=words,
    dry_run=st.booleans(),
    names=st.lists(words, max_size=3),
    betas=st.tuples(finite, finite),
    sampler=st.sampled_from(["vllm", "hf", "off"]),
    columns=st.dictionaries(words, words, max_size=2),
)
def test_dump_loads_back_equal(tmp_path_factory, **values):
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    config = Tiny(**values)
    path.write_text(to_yaml(config))
    assert Tiny.load([path]) == config


def test_write_whole_replaces_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with write_whole(str(path)) as tmp:
        tmp.write_text("new")
        assert path.read_text() == "old" and tmp.parent == tmp_path  # a rename between disks is none
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError):
        with write_whole(path) as tmp:
            tmp.write_text("half")
            raise RuntimeError
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_and_nothing_else(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = {".a.txt.bak", f".a.txt.{os.getppid()}", f".b.{dead.pid}", f".a.txt.b.{dead.pid}", "a.txt.1"}
    for name in (*kept, f".a.txt.{os.getpid()}", f".a.txt.{dead.pid}"):
        (tmp_path / name).mkdir()
    with write_whole(tmp_path / "a.txt") as tmp:
        tmp.write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == kept | {"a.txt"}


def test_a_full_disk_is_named_with_what_is_whole(tmp_path):
    path, lines = tmp_path / "a.txt", tmp_path / "lines.jsonl"
    path.write_text("old")
    append(lines, "é\n")
    for write, message in (
        (lambda: tmp.write_text("x" * 99), f"{path} was not written; the one before is whole"),
        (lambda: append(lines, "y" * 99 + "\n"), f"{lines} is whole up to its last line"),
        (lambda: append("/dev/full", "y\n"), "/dev/full is whole up to its last line"),
    ):
        with limited(10), pytest.raises(DiskFull) as error, write_whole(path) as tmp:
            write()
        assert str(error.value).partition(": ")[2] == message and str(error.value).startswith("disk full (")
        assert path.read_text() == "old" and lines.read_bytes() == b"\xc3\xa9\n"
        assert sorted(tmp_path.iterdir()) == [path, lines]
    with pytest.raises(DiskFull, match="disk full .*new was not written; nothing is left of it"):
        with limited(10), write_whole(tmp_path / "new") as tmp:
            tmp.mkdir()
            (tmp / "weights").write_bytes(bytes(99))
    with pytest.raises(ValueError, match="something else"), write_whole(path):
        raise ValueError("something else")
    assert sorted(tmp_path.iterdir()) == [path, lines]


def test_run_record(tmp_path):
    folder = tmp_path / "runs" / "a"
    config = Tiny(learning_rate=3e-7)
    write_run_record(config, folder)
    write_run_record(config, folder)  # a resumed run writes it again
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]
    assert Tiny.load([folder / "config.yaml"]) == config
    record = json.loads((folder / "run.json").read_text())
    assert record == json.loads(json.dumps(describe_run(config)))
    assert record["config"] == config.model_dump(mode="json")
    assert {"torch", "transformers", "accelerate", "datasets", "numpy", "scipy"} <= set(record["packages"])
    assert record["packages"]["numpy"] == np.__version__
    assert shlex.split(record["command"]) == sys.orig_argv


def test_git_revision_marks_changes(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, timeout=60
        )

    monkeypatch.setattr(config_module, "__file__", str(tmp_path / "config.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_run(Tiny())["git"] is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    clean = describe_run(Tiny())["git"]
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert describe_run(Tiny())["git"] == clean + "-dirty"


# ---- as a program ----

SCRIPT = """
from config import Config, opt

class TrainConfig(Config):
    learning_rate: float = opt(1e-6, "AdamW step size", gt=0)
    steps: int = opt(..., "updates", ge=1)

if __name__ == "__main__":
    print(TrainConfig.parse_args().learning_rate)
"""


def run(tmp_path, *argv):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "tiny.yaml").write_text("steps: 4\n")
    return subprocess.run(
        [sys.executable, "train.py", *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
        timeout=60,
    )


def test_program_ends_with_one_message_and_status_2(tmp_path):
    done = run(tmp_path, "tiny.yaml", "learnig_rate=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "command line: learnig_rate=1: unknown key 'learnig_rate'; did you mean 'learning_rate'?\n"
    )


def test_program_runs(tmp_path):
    done = run(tmp_path, "tiny.yaml", "learning_rate=1e-3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.001\n", "")


def test_help_lists_every_key(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines == [
        "usage: train.py [config.yaml ...] [key=value ...]",
        "",
        "learning_rate: float > 0 = 1e-06 AdamW step size",
        "steps: int >= 1 updates",
    ]


def test_import_is_light():
    code = "import sys, config; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
