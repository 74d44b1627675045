"""The drawn world: scenes, pictures, rows, worked examples."""

import random
from collections import Counter

import numpy as np
import pytest

import tiny
from rewards import spatial_reward
from scenes import clean
from stvqa import COLUMNS
from tiny import (
    COLORS,
    POSITIONS,
    ask,
    cell_of,
    draw_graphs,
    measured_rows,
    read_off,
    render,
    row,
    rows,
    worked_example,
)

SIX = {"relation", "instance_location", "size", "distance", "count", "existence"}


def test_rows_are_balanced_exact_and_deterministic():
    taken = set()
    val = rows(64, 0, "val", taken)
    train = rows(600, 0, "train", taken)
    assert val == rows(64, 0, "val", set())
    assert len(taken) == 664
    assert not {r["images"]["bytes"] for r in val} & {r["images"]["bytes"] for r in train}
    assert list(train[0]) == list(COLUMNS)
    assert Counter(r["category"] for r in train) == {"relation": 300} | dict.fromkeys(SIX - {"relation"}, 60)
    for n in (2, 3, 4):  # exactly balanced over the letters
        letters = [r["answer_only"] for r in train if len(r["options"]) == n]
        counts = [letters.count(letter) for letter in "ABCD"[:n]]
        assert max(counts) - min(counts) <= 1
    for r in train:
        assert r["options"]["ABCD".index(r["answer_only"])] == r["answer_text_only"]
        assert len(set(r["options"])) == len(r["options"])


def test_worked_examples_are_well_formed_and_careful_ones_perfect():
    right, chance = [], []
    for graph, q, options in ask(400, 5, {"relation": 0.5}, set()):
        truth = row(graph, q, options, "x")["answer_option_text"]
        careful = worked_example(graph, q, options)
        hasty = worked_example(graph, q, options, hasty=True)
        # CIoU's denominators hold 1e-7 more than areas of (12 / 84)^2 and up
        assert spatial_reward(careful, truth, (84, 84))["reward"] == pytest.approx(1, abs=1e-5)
        score = spatial_reward(hasty, truth, (84, 84))
        assert score["format"] == 1 and score["count"] == 1 and score["spatial"] < 0.95
        first = min((o for o in graph.objects if o.id in q.objects), key=lambda o: cell_of(o.box))
        assert f"{POSITIONS[cell_of(first.box)]} {first.label}" in careful.split("</observe>")[0]
        assert all(f"(A) {options[0]}" in text for text in (careful, hasty))
        right.append(score["accuracy"])
        chance.append(1 / len(options))
    # Letters are even to one item within each number of options, of which there are three.
    assert sum(right) == pytest.approx(sum(chance), abs=3)


def test_gold_boxes_are_where_the_paint_is():
    for raw in draw_graphs(20, seed=3):
        graph, dropped = clean(raw)
        assert not dropped and [o.box for o in graph.objects] == [o.box for o in raw.objects]
        pixels = np.array(render(graph)).astype(int)
        assert (pixels == np.array(render(raw))).all()
        for s in graph.objects:
            x1, y1, x2, y2 = (int(v) for v in s.box)
            painted = (pixels == COLORS[s.attributes[0]]).all(-1)
            mine = painted[y1:y2, x1:x2]
            sides = (mine[0], mine[-1], mine[:, 0], mine[:, -1])
            assert all(side.any() for side in sides)


# ---- the measured set --------------------------------------------------------------------------------------
A, B = (4, 6, 18, 20), (30, 8, 48, 26)


@pytest.mark.parametrize("category, boxes, said", [
    ("size", (A, B), ("4 to 18 : 14 , 30 to 48 : 18 , 32", "32")),
    ("size", ((0, 0, 14, 14), (28, 0, 42, 14)), ("0 to 14 : 14 , 28 to 42 : 14 , 28", "28")),
    ("distance", (A, B), ("18 to 30 : 12", "12")),
    ("distance", (B, A), ("18 to 30 : 12", "12")),  # whichever is named first
    ("distance", (A, (60, 0, 70, 10)), ("18 to 60 : 42", "16")),  # the nearest of the options
    ("relation", (A, (10, 60, 20, 70)), ("4 to 10 : 6", "red circle")),
    ("relation", ((10, 60, 20, 70), A), ("10 to 4 : -6", "blue square")),
])  # fmt: skip
def test_what_boxes_say_by_hand(category, boxes, said):
    options = [o.format("red circle", "blue square") for o in tiny.MEASURES[category][1]]
    assert read_off(category, *boxes, options, random.Random(0)) == said


def test_measured_rows_are_even_and_answers_follow_from_exact_boxes(monkeypatch):
    taken = set()
    made = list(measured_rows(240, 0, taken))
    assert made == list(measured_rows(240, 0, set())) and len(taken) == 240
    letters = Counter((r["category"], r["answer_only"]) for r in made)
    assert letters == dict.fromkeys([("relation", x) for x in "AB"], 40) | dict.fromkeys(
        [(c, x) for c in ("size", "distance") for x in "ABCD"], 20
    )
    scores = [spatial_reward(r["completion"], r["answer_option_text"], (84, 84)) for r in made]
    assert all(s["format"] == s["count"] == 1 for s in scores)
    assert sum(s["accuracy"] for s in scores) < 0.75 * 240  # coarse boxes mislead
    monkeypatch.setattr(tiny, "FINE", 1.0)
    for r in measured_rows(60, 1, set()):
        assert spatial_reward(r["completion"], r["answer_option_text"], (84, 84))["reward"] == pytest.approx(
            1, abs=1e-5
        )
