"""Reward functions of one's own: four signatures, named terms, and what goes wrong with them."""

import pytest
from test_rewards import GOLD, GOOD, SIZE

from data import Sample
from rewards import Score
from scoring import RewardError, columns_of, load_reward, means

ROW = {"row_id": "7 (#3)", "image_size": SIZE, "kind": "choice", "gold": GOLD, "correct": True}
ROW |= {"answer_option_text": GOLD, "problem": "Which?", "color": "red"}
THEIRS = {"reward_model": {"ground_truth": "7"}, "extra_info": {"index": "val"}}
FILE = """
import numpy as np, torch
from dataclasses import dataclass
from beside_me import ONE

@dataclass
class Kept:
    n: int = 0

def plain(completion, row): return 0.25 * row["correct"] + Kept().n
def terms(completion, row): return {"reward": np.float32(0.5), "chars": len(completion)}
def trl(completions, color, **kwargs): return [len(c) + (color == ["red"]) for c in completions]
def trl_few(prompts, completions): return [float(p == "Which?") for p in prompts]
def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.5 * (ground_truth == "7"), "seen": extra_info["color"] == "red"}
def verl_few(solution_str, ground_truth): return 0.75
def verl_own(solution_str, ground_truth, extra_info):
    return {"score": ground_truth == "7", "pred": None, "kind": extra_info["index"], "n": [1, 2]}
def easy(reward_input): return {"overall": ONE * (reward_input["response"] == "hi"), "format": True}
def easy_batch(reward_inputs, weight=0.5):
    return [{"overall": weight * (r["ground_truth"] == "7")} for r in reward_inputs]
async def waits(completion, row): return torch.tensor([0.5])
async def trl_waits(completions, **_): return [torch.tensor(0.5, dtype=torch.bfloat16)] * len(completions)
class Kind:
    def __call__(self, completions, **_): return np.array([True] * len(completions))
made = Kind()
class Odd:
    def __init__(self, needed): pass
def inside(completion, row): row["options"].append(1); return len(row["options"])
def gold_second(response, ground_truth): return 1.0
def message(completions, **_): return [float(c[0]["content"]) for c in completions]
def numbers(completion, row): return [0.5, 0.5]
def pair(completion, row): return np.ones(2)
def huge(completion, row): return 10**400
def found(completion, row): return {"reward": 1, "matches": 3}
def quiet(completion, row): raise ValueError("\\n")
def nan(completion, row): return float("nan")
def nan_term(completion, row): return {"reward": 1, "part": np.inf}
def nothing(completion, row): return None
def text(completion, row): return "1.0"
def unnamed(completion, row): return {"part": 1.0}
def fails(completion, row): return row["lacking"]
def leaves(completion, row): raise SystemExit("bye")
def two(completions, **columns): return [1.0, 2.0]
def needs(completions, other): return [1.0]
def three(completion, row, other): return 1.0
def spoils(completion, row): row.clear(); return 1
number = 3
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("a reward") / "mine.py"
    path.write_text(FILE)
    (path.parent / "beside_me.py").write_text("ONE = 1")
    return path


@pytest.mark.parametrize("name, expected", [
    ("plain", {"reward": 0.25}),
    ("terms", {"reward": 0.5, "chars": 2}),
    ("trl", {"reward": 3}),
    ("trl_few", {"reward": 1}),
    ("verl", {"reward": 0.5, "score": 0.5, "seen": 1}),
    ("verl_few", {"reward": 0.75}),
    ("verl_own", {"reward": 1, "score": 1, "pred": None, "kind": "val", "n": "[1, 2]"}),
    ("easy", {"reward": 1, "overall": 1, "format": 1}),
    ("easy_batch", {"reward": 0.5, "overall": 0.5}),
    ("waits", {"reward": 0.5}),
    ("trl_waits", {"reward": 0.5}),
    ("Kind", {"reward": 1}),
    ("made", {"reward": 1}),
])  # fmt: skip
def test_each_signature(mine, name, expected):
    assert vars(load_reward(f"{mine}:{name}")("hi", ROW | THEIRS)) == {"reason": None} | expected


@pytest.mark.parametrize("name, message", [
    ("nan", "expected reward to be a finite number, got nan"),
    ("nan_term", "expected part to be a finite number, got inf"),
    ("nothing", "expected reward to be a finite number, got None"),
    ("text", "expected reward to be a finite number, got '1.0'"),
    ("unnamed", "expected a number or terms with 'reward', got ['part']"),
    ("fails", "KeyError: 'lacking'"),
    ("leaves", "SystemExit: bye"),
    ("two", "too many values"),
    ("message", "TypeError: string indices"),
    ("numbers", "expected reward to be a finite number, got [0.5, 0.5]"),
    ("pair", "expected reward to be a finite number, got array([1., 1.])"),
    ("huge", "OverflowError: int too large"),
    ("quiet", "ValueError: "),
    ("found", "expected matches of (predicted, gold, IoU, CIoU), got 3"),
    ("needs", "missing 1 required positional argument: 'other'"),
])  # fmt: skip
def test_a_failing_function_names_the_row(mine, name, message):
    with pytest.raises(RewardError) as error:
        load_reward(f"{mine}:{name}")("hi", ROW)
    text = str(error.value)
    assert text.startswith(f"row 7 (#3): reward {mine}:{name}: ") and message in text and "\n" not in text


def test_the_row_is_the_functions_own(mine):
    row = ROW | {"options": [0]}
    load_reward(f"{mine}:spoils")("hi", row)
    assert [load_reward(f"{mine}:inside")("hi", row).reward for _ in range(2)] == [2, 2]
    assert row == ROW | {"options": [0]}


def test_a_function_that_is_not_there(mine, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import not_installed_here")
    for where, message in [
        (f"{tmp_path}/none.py:f", "none.py cannot be loaded: FileNotFoundError"),
        (
            f"{broken}:f",
            "broken.py cannot be loaded: ModuleNotFoundError: No module named 'not_installed_here'",
        ),
        (
            f"{mine}:three",
            "expected parameters (completion, row), TRL's, verl's or EasyR1's, got (completion, row, other)",
        ),
        (f"{mine}:gold_second", "EasyR1's, got (response, ground_truth)"),
        (f"{mine}:Odd", "mine.py cannot be loaded: TypeError: Odd.__init__() missing 1 required"),
        (f"{mine}:missing", "expected a function 'missing' in"),
        (f"{mine}:number", "expected a function 'number' in"),
    ]:
        with pytest.raises(ValueError) as error:
            load_reward(where)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_built_in_rewards_and_those_of_rewards_py_take_the_same_path():
    expected = vars(load_reward("spatial")(GOOD, ROW))
    assert set(expected) == set(vars(Score())) and expected["reward"] == pytest.approx(1, abs=1e-5)
    row = ROW | {"gold": "(B) left"}  # as the trainer gives it to any function but `spatial`
    assert load_reward("rewards.py:trl_spatial_reward")(GOOD, row).reward == expected["reward"]
    verl = load_reward("rewards.py:compute_score")(GOOD, row)
    assert (verl.reward, verl.spatial) == (expected["reward"], expected["spatial"])
    assert load_reward("rewards.py:compute_score_batch")(GOOD, row).reward == expected["reward"]
    assert vars(load_reward("vanilla")("<answer>(B) left</answer>", ROW))["reward"] == 0.5


@pytest.mark.parametrize("record, full, prompt", [
    ({"problem": "Which?", "kind": "theirs"}, "Look. Which?", "Which?"),
    ({"prompt": "Look. Which?"}, "Look. Which?", "Look. Which?"),
    ({}, "", "Left or right?"),
])  # fmt: skip
def test_columns_have_a_prompt_whatever_its_column_is_called(mine, record, full, prompt):
    sample = Sample("7", (), SIZE, "Left or right?", ("left", "right"), "(A) left", "(A) left", problem=full)
    row = columns_of(sample, record)
    added = {"problem": prompt, "row_id": "7", "image_size": SIZE, "kind": "choice", "gold": "(A) left"}
    assert row == record | added
    assert load_reward(f"{mine}:trl_few")("hi", row).reward == (prompt == "Which?")


@pytest.mark.parametrize("kind, judged, accuracy", [
    ("choice", True, 1), ("number", True, 0), ("number", False, 1)
])  # fmt: skip
def test_open_answers_are_judged_where_the_config_says_so(kind, judged, accuracy):
    row = ROW | {"kind": kind, "correct": False}
    assert load_reward("spatial", judge_answers=judged)(GOOD, row).accuracy == accuracy


def test_means_hide_no_metric_of_the_trainer(mine):
    scores = [load_reward(f"{mine}:terms")(text, ROW) for text in ("hi", "four")]
    assert means(scores) == {"reward": 0.5, "reward/chars": 3}
    scores.append(load_reward(f"{mine}:plain")("hi", ROW))  # names one term less
    assert means(scores) == {"reward": 1.25 / 3, "reward/chars": 3}
    scores = [load_reward(f"{mine}:verl_own")("hi", ROW | THEIRS)]
    assert means(scores) == {"reward": 1, "reward/score": 1}  # text, None and a list have no mean
    assert set(means([load_reward("spatial")(GOOD, ROW)])) == {
        "reward", "format", "count", "exact", "spatial", "relation"
    }  # fmt: skip
