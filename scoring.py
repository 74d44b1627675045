"""What a completion of a row earns in training: `spatial`, `vanilla`, or a function of one's own.

    python train_grpo.py my.yaml reward=path/to/file.py:brevity

    def brevity(completion, row):       # row: the columns, and what `columns_of` adds
        return {"reward": row["correct"] / (1 + len(completion)), "length": len(completion)}

Which of three signatures a function has is told by its parameters' names, docs/rewards.md.
"""

import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import SimpleNamespace

from results import judge
from rewards import score_completion, vanilla_reward


class RewardError(RuntimeError):
    """A reward function fails, or returns what is no reward: the message names it and the row."""


def spatial(completion: str, row: dict, judge_answers: bool = False, **how) -> dict:
    """The gated spatial reward. judge_answers: open answers as evaluation reads; how: of score_completion."""
    judged = judge_answers and row["kind"] != "choice"
    how["judge"] = (lambda _: row["correct"]) if judged else None
    return vars(score_completion(completion, row["gold"], row["image_size"], **how))


def vanilla(completion: str, row: dict) -> dict:
    """The sparse reward: half accuracy, half format."""
    return vanilla_reward(completion, row["gold"])


def columns_of(sample, record: dict) -> dict:
    """A row as a reward function sees it: the columns of its record, images encoded as they are stored, and
    row_id, image_size (W, H), kind, gold (scene in pixels and answer, or the answer where none is needed).
    The trainer adds `correct`: whether the completion's answer is right as evaluation reads it."""
    added = {"row_id": sample.id, "image_size": sample.size, "kind": sample.kind, "gold": sample.ground_truth}
    return record | added


@functools.cache
def find_function(where: str) -> Callable:
    """The function of "path/to/file.py:name", or of a name in this file. Raises: ValueError, in one line."""
    path, _, name = where.rpartition(":")
    if not path:
        return {"spatial": spatial, "vanilla": vanilla}[name]
    file = Path(path)
    try:
        spec = importlib.util.spec_from_file_location(f"reward_of_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look for it
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a foreign file raises
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} cannot be loaded: {why}") from error
    if not callable(function := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise ValueError(f"expected a function {name!r} in {file}, which has {known[:20]}")
    return function


def adapt(function: Callable) -> Callable:
    """A function of TRL's, verl's or the plain signature as one of (completion, row). Raises: ValueError."""
    parameters = (signature := inspect.signature(function)).parameters.values()
    names, takes_all = {p.name for p in parameters}, any(p.kind == p.VAR_KEYWORD for p in parameters)

    def call(arguments: dict):
        return function(**{k: v for k, v in arguments.items() if takes_all or k in names})

    def trl(completion, row):
        columns = {name: [value] for name, value in row.items()}
        (value,) = call({"prompts": [row.get("problem")]} | columns | {"completions": [completion]})
        return value

    def verl(completion, row):
        known = {"data_source": row.get("data_source"), "ground_truth": row.get("ground_truth", row["gold"])}
        terms = call(known | {"solution_str": completion, "extra_info": {"index": row["row_id"]} | row})
        return {"reward": terms["score"]} | terms if isinstance(terms, dict) and "score" in terms else terms

    if "completions" in names or "solution_str" in names:
        return trl if "completions" in names else verl
    try:
        signature.bind("completion", {})
    except TypeError:
        raise ValueError(f"expected parameters (completion, row), TRL's or verl's, got {signature}") from None
    return function


def load_reward(where: str, **options) -> Callable[[str, dict], SimpleNamespace]:
    """(completion, row) -> the terms: `reward`, those that the function names, and where it has them, as
    rewards.Score does, `reason` and `matches`. Options go to `spatial` alone.

    Raises: ValueError if there is no such function; when called, RewardError naming the row.
    """
    try:
        function = adapt(find_function(where))
    except ValueError as error:
        raise ValueError(f"reward {where}: {error}") from None
    function = functools.partial(function, **options) if where == "spatial" else function

    def score(completion: str, row: dict) -> SimpleNamespace:
        try:
            terms = function(completion, dict(row))
            terms = dict(terms) if isinstance(terms, dict) else {"reward": terms}
            return SimpleNamespace(
                **{name: checked(name, value) for name, value in terms.items()}, **lacking(terms)
            )
        except (Exception, SystemExit) as error:  # whatever a foreign function raises
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RewardError(f"row {row['row_id']}: reward {where}: {why}") from error

    return score


def make_scorer(data, cfg) -> Callable:
    """What gives a Rollout of these rows, cut off or not, its `score` and says whether it is `correct`.

    Args: data: data.Samples; cfg: train_grpo.GRPOConfig.
    """
    reward = load_reward(cfg.reward, **cfg.scoring)

    @functools.lru_cache(1)  # the rollouts of a group come one after the other
    def row_of(i: int):
        return (sample := data[i]), columns_of(sample, data.table[data.rows[i]])

    def scored(r):
        sample, row = row_of(r.row)
        r.correct = judge(sample, r.text, "stop" if r.finished else "length", cfg.box_frame)["correct"]
        r.score = reward(r.text, row | {"correct": r.correct})
        return r

    return scored


def checked(name: str, value):
    """A term as a float. Raises: ValueError if it is not a finite number."""
    if name == "matches":
        return tuple((int(i), int(j), float(iou), float(ciou)) for i, j, iou, ciou in value)
    if name == "reason":
        return value if value is None else str(value)
    value = value.item() if hasattr(value, "item") else value  # of numpy or torch
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be a finite number, got {repr(value)[:80]}")
    return float(value)


def lacking(terms: dict) -> dict:
    if "reward" not in terms:
        raise ValueError(f"expected a number or terms with 'reward', got {sorted(map(str, terms))}")
    return {} if "reason" in terms else {"reason": None}


def means(scores: list) -> dict[str, float]:
    """The mean of each term over completions: those of `spatial` under their names in docs/metrics.md, others
    as reward/NAME, so that none hides a metric of the trainer. A term that a completion lacks is left out of
    its mean."""
    known = {"accuracy": "exact"} | {n: n for n in ("reward", "format", "count", "spatial", "relation")}
    names = dict.fromkeys(name for s in scores for name in vars(s) if name not in ("reason", "matches"))
    held = {name: [vars(s)[name] for s in scores if name in vars(s)] for name in names}
    return {known.get(name, f"reward/{name}"): sum(values) / len(values) for name, values in held.items()}
