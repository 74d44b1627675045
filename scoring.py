"""What a completion of a row earns in training: `spatial`, `vanilla`, or a function of one's own.

    python train_grpo.py my.yaml reward=path/to/file.py:brevity

    def brevity(completion, row):       # row: the columns, and what `columns_of` adds
        return {"reward": row["correct"] / (1 + len(completion)), "length": len(completion)}

Which of four signatures a function has is told by its parameters' names, docs/rewards.md.
"""

import asyncio
import copy
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

TOTALS = "reward", "score", "overall"  # of one's own, of verl, of EasyR1: the first of them is the reward


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
    row_id, image_size (W, H), kind, gold (scene in pixels and answer, or the answer where none is needed),
    and where no column has this name, problem: the row's prompt, or its question with its options.
    The trainer adds `correct`: whether the completion's answer is right as evaluation reads it."""
    added = {"row_id": sample.id, "image_size": sample.size, "kind": sample.kind, "gold": sample.ground_truth}
    return {"problem": sample.problem or sample.question} | record | added


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
        if (folder := str(file.parent.resolve())) not in sys.path:
            sys.path.append(folder)  # last, so that no file beside it hides one of ours
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        function = function() if inspect.isclass(function) else function
    except (Exception, SystemExit) as error:  # whatever a foreign file raises
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} cannot be loaded: {why}") from error
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise ValueError(f"expected a function {name!r} in {file}, which has {known[:20]}")
    return function


def adapt(function: Callable) -> Callable:
    """A plain function, or one of TRL, verl or EasyR1, async or not, as one of (completion, row).

    Raises: ValueError.
    """
    parameters = (signature := inspect.signature(function)).parameters.values()
    names, takes_all = {p.name for p in parameters}, any(p.kind == p.VAR_KEYWORD for p in parameters)

    def call(*given, **arguments):
        value = function(*given, **{k: v for k, v in arguments.items() if takes_all or k in names})
        return asyncio.run(value) if inspect.iscoroutine(value) else value

    def trl(completion, row):
        columns = {name: [value] for name, value in row.items()}
        (value,) = call(**{"prompts": [row.get("problem")]} | columns | {"completions": [completion]})
        return value

    def verl(completion, row):
        extra = {"index": row["row_id"]} | row | dict_in(row, "extra_info")
        known = {"data_source": row.get("data_source"), "ground_truth": ground_truth(row)}
        return call(solution_str=completion, extra_info=extra, **known)

    def easyr1(completion, row):
        given = row | {"response": completion, "ground_truth": ground_truth(row)}
        value = call(reward_input=given, reward_inputs=[given])
        return value[0] if "reward_inputs" in names else value

    known = {"completions": trl, "solution_str": verl, "reward_inputs": easyr1, "reward_input": easyr1}
    if found := [known[name] for name in known if name in names]:
        return found[0]
    try:
        signature.bind("completion", {})
        if "ground_truth" in list(signature.parameters)[:2]:
            raise TypeError("it would be given the row")
    except TypeError:
        expected = "expected parameters (completion, row), TRL's, verl's or EasyR1's"
        raise ValueError(f"{expected}, got {signature}") from None
    return call


def ground_truth(row: dict):
    """Where the data of verl and EasyR1 have it, else STVQA-7K's, else the gold text."""
    places = row, dict_in(row, "reward_model"), {"ground_truth": row.get("answer_option_text", row["gold"])}
    return next(place["ground_truth"] for place in places if "ground_truth" in place)


def dict_in(row: dict, name: str) -> dict:
    return value if isinstance(value := row.get(name), dict) else {}


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
            terms = function(completion, copy.deepcopy(row))
            terms = dict(terms) if isinstance(terms, dict) else {"reward": terms}
            total = next((name for name in TOTALS if name in terms), "reward")
            terms = {"reward": terms[total]} | terms if total in terms else terms
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
    """A term as a float, or as text or None where it is no number. Raises: ValueError if the reward is not
    a number, or a number not finite."""
    if name == "matches":
        try:
            return tuple((int(i), int(j), float(iou), float(ciou)) for i, j, iou, ciou in value)
        except (TypeError, ValueError):
            expected = "expected matches of (predicted, gold, IoU, CIoU)"
            raise ValueError(f"{expected}, got {repr(value)[:80]}") from None
    if math.prod(getattr(value, "shape", (0,))) == 1:  # of numpy or torch
        value = value.item()
    if name != "reward" and (name == "reason" or not isinstance(value, Real)):
        return value if value is None else str(value)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"expected {name} to be a finite number, got {repr(value)[:80]}")
    return float(value)


def lacking(terms: dict) -> dict:
    if "reward" not in terms:
        raise ValueError(f"expected a number or terms with 'reward', got {sorted(map(str, terms))}")
    return {} if "reason" in terms else {"reason": None}


def means(scores: list) -> dict[str, float]:
    """The mean of each term over completions: those of `spatial` under their names in docs/metrics.md, others
    as reward/NAME, so that none hides a metric of the trainer. Where a completion lacks the term, or it is no
    number, it is left out."""
    known = {"accuracy": "exact"} | {n: n for n in ("reward", "format", "count", "spatial", "relation")}
    held = {}
    for name, value in (term for s in scores for term in vars(s).items()):
        if isinstance(value, Real):
            held.setdefault(name, []).append(value)
    return {known.get(name, f"reward/{name}"): sum(values) / len(values) for name, values in held.items()}
