"""The reward: values by hand, every gate and rejection, parity with the released formula, hostile texts."""

import copy
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import rewards
from rewards import (
    MAX_CHARS,
    MAX_OBJECTS,
    REJECTION_REASONS,
    Score,
    Weights,
    ciou,
    compute_score,
    compute_score_batch,
    extract_answer,
    in_per_mille,
    in_pixels,
    label_similarity,
    parse_ground_truth,
    parse_scene,
    score_completion,
    spatial_reward,
    trl_spatial_reward,
    vanilla_reward,
)

SIZE = (200, 100)  # W != H, so that swapping them shows

# ---- float bounds ------------------------------------------------------------------------------------------
# All of it is float64: an operation rounds by 2**-53 of its result.
ROUNDING = 128 * 2.0**-53  # 1.4e-14: sums and quotients of some dozen numbers up to 1
EPS = 1e-7  # the released code's; by its own value here, so that the bounds do not move with the formula's
# EPS stands in three denominators, and values by hand leave it out. It moves IoU by at most EPS / union, the
# distance term by EPS / diagonal**2 and an arctan by EPS / (2 height), thus v by 4 / pi * EPS / (2 height);
# alpha v moves by no more than v and IoU do. Of the boxes in question no union is below 0.24, no squared
# diagonal below 0.5 and no height below 0.5.
CIOU_EPS = EPS * (2 / 0.24 + 1 / 0.5 + 0.64 / 0.5)  # 1.2e-6
# Of boxes of any size: coordinates in [0, 1] carry 2**-53, no denominator is below EPS, CIoU has three terms.
PARITY = 8 * 2.0**-53 / EPS  # 9e-9
# Exchanged boxes: only the centres' distance d is summed in another order, hence off by e < 2**-50, and its
# term by d e / (diagonal**2 + EPS) <= e / (2 sqrt(EPS)), as d <= diagonal.
SYMMETRY = 2.0**-50 / math.sqrt(EPS)  # 2.8e-12


# ---- building texts ----------------------------------------------------------------------------------------
def obj(name, box):
    return {"id": name, "bbox": list(box)}


def rel(subject, predicate, object_):
    return {"subject": subject, "predicate": predicate, "object": object_}


def graph(objects=(), relationships=()):
    return {"objects": list(objects), "relationships": list(relationships)}


def many(n, label="a"):
    return [obj(f"{label}.{i}", (0, 0, 9 + i % 50, 9)) for i in range(n)]


def gold_text(scene, answer="(B) left"):
    return f"<scene>{json.dumps(scene)}</scene>\n<answer>{answer}</answer>"


def reply(scene, answer="(B) left"):
    scene = scene if isinstance(scene, str) else json.dumps(scene)
    return f"<observe>o</observe>\n<scene>{scene}</scene>\n<think>t</think>\n<answer>{answer}</answer>"


DOG, CAT = obj("dog.1", (20, 20, 100, 80)), obj("cat.1", (120, 10, 180, 90))
MOVED, MOVED_SPATIAL = obj("dog.1", (40, 20, 120, 80)), (1 + 0.6 - 1 / 61) / 2  # see test_spatial_by_hand
SCENE = graph([DOG, CAT], [rel("dog.1", "left of", "cat.1")])
GOLD, GOOD = gold_text(SCENE), reply(SCENE)
ZERO = {"reward": 0.0, "format": 0.0, "count": 0.0, "accuracy": 0.0, "spatial": 0.0}


def reward_of(completion, gold=GOLD, size=SIZE, **options):
    return spatial_reward(completion, gold, size, **options)


def reason_of(completion, gold=GOLD, size=SIZE):
    score = score_completion(completion, gold, size)
    assert score.reason is None or score == Score(reason=score.reason)  # all else is zero
    return score.reason


# ---- CIoU by hand ------------------------------------------------------------------------------------------
def test_ciou_equal_boxes():
    assert ciou((0.1, 0.2, 0.5, 0.9), (0.1, 0.2, 0.5, 0.9)) == pytest.approx(1, abs=CIOU_EPS)


def test_ciou_shifted_squares():
    # Squares of side 2, one shifted by 1. Intersection 1*2 = 2, union 4 + 4 - 2 = 6, IoU 1/3.
    # Centres (1, 1), (2, 1): rho^2 = 1. Hull 3 x 2: c^2 = 9 + 4 = 13. Equal aspect: v = 0.
    assert ciou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3 - 1 / 13, abs=CIOU_EPS)


def test_ciou_disjoint():
    # Unit squares at (0, 0) and (3, 4): IoU 0, rho^2 = 9 + 16 = 25, hull 4 x 5: c^2 = 41.
    assert ciou((0, 0, 1, 1), (3, 4, 4, 5)) == pytest.approx(-25 / 41, abs=CIOU_EPS)


def test_ciou_aspect():
    # 2 x 1 against 1 x 2 around the same centre: intersection 1 * 1, union 2 + 2 - 1 = 3, IoU 1/3, rho = 0.
    # v = 4/pi^2 (atan 2 - atan 1/2)^2 = 0.405285 * 0.643501^2 = 0.16782585;
    # alpha = v / (1 - 1/3 + v) = 0.167826 / 0.834493 = 0.201111; CIoU = 1/3 - alpha v.
    assert ciou((-1, -0.5, 1, 0.5), (-0.5, -1, 0.5, 1)) == pytest.approx(0.29958166, abs=CIOU_EPS)


def test_ciou_contained():
    # 4 x 4 in a corner of 8 x 8: IoU 16/64, centres (2, 2), (4, 4): rho^2 = 8, c^2 = 64 + 64 = 128, v = 0.
    assert ciou((0, 0, 4, 4), (0, 0, 8, 8)) == pytest.approx(1 / 4 - 8 / 128, abs=CIOU_EPS)


def test_ciou_of_equal_boxes_in_pixels():
    # EPS vanishes beside an area of 10^10: IoU is exactly 1 and v 0, and alpha is 0 / 0 but for its floor.
    assert ciou((0, 0, 1e5, 1e5), (0, 0, 1e5, 1e5)) == 1


def test_ciou_stops_at_minus_one():
    # Slim, crossed and far apart: rho^2 / c^2 is near 1 and alpha v near 1/2, the formula gives about -1.4.
    assert ciou((0, 0, 0.1, 0.0001), (0.95, 0.9, 0.9501, 1)) == -1.0


@pytest.mark.parametrize(
    "box", [(0, 0, 1), (0, 0, 1, math.nan), (0, 0, math.inf, 1), (1, 0, 0, 1), (0, 1, 1, 0)]
)
def test_ciou_refuses(box):
    with pytest.raises(ValueError, match="expected"):
        ciou(box, (0, 0, 1, 1))


@np.errstate(divide="raise", invalid="raise")  # a NaN would come out of the cut at -1 as -1
def test_ciou_of_degenerate_boxes():
    boxes = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 5e-324, 1), (0, 0, 1, 1)]
    for a, b in itertools.product(boxes, repeat=2):
        assert -1 <= ciou(a, b) <= 1
    for box in boxes[:-2]:
        assert ciou(box, box) == 0  # no area to share, no distance, one shape
    assert ciou(boxes[0], boxes[1]) == pytest.approx(-1, abs=EPS)  # distance^2 and diagonal^2 are 2


coordinate = st.floats(0, 1, allow_nan=False)
box01 = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(box01, box01)
def test_ciou_range_and_symmetry(a, b):
    assert -1 <= ciou(a, b) <= 1
    assert ciou(a, b) == pytest.approx(ciou(b, a), abs=SYMMETRY)


# ---- reference: the released formula, straight down --------------------------------------------------------
def reference_ciou(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    iou = inter / (union + 1e-7)
    rho2 = ((a[0] + a[2]) / 2 - (b[0] + b[2]) / 2) ** 2 + ((a[1] + a[3]) / 2 - (b[1] + b[3]) / 2) ** 2
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    atan_a, atan_b = (math.atan((box[2] - box[0]) / (box[3] - box[1] + 1e-7)) for box in (a, b))
    v = 4 / math.pi**2 * (atan_b - atan_a) ** 2
    alpha = v / (1 - iou + v)
    return iou - rho2 / (c2 + 1e-7) - alpha * v


def reference(pred, gold, pred_answer, gold_answer, size, similarity):
    """Terms of a well-formed completion; the assignment by trying every one."""
    po, go, pr, gr = pred["objects"], gold["objects"], pred["relationships"], gold["relationships"]
    count = max(0, 1 - abs(len(po) - len(go)) / max(len(go), 1))
    if gr:
        count = 0.7 * count + 0.3 * max(0, 1 - abs(len(pr) - len(gr)) / max(len(gr), 1))
    accuracy = 1.0 if pred_answer.strip().lower() == gold_answer.strip().lower() else 0.0
    spatial = 0.0
    if accuracy and not go:
        spatial = 0.0 if po or gr else 1.0
    elif accuracy and po:
        w, h = size
        unit = [[x / s for x, s in zip(o["bbox"], (w, h, w, h), strict=True)] for o in (*po, *go)]
        pb, gb = unit[: len(po)], unit[len(po) :]
        label = [re.sub(r"[_-]", " ", o["id"].split(".")[0]).strip().lower() for o in (*po, *go)]
        pl, gl = label[: len(po)], label[len(po) :]
        near = [[(reference_ciou(p, g) + 1) / 2 for g in gb] for p in pb]
        cost = [
            [2.0 * (1 - similarity(p, g)) + 1.0 * (1 - near[i][j]) for j, g in enumerate(gl)]
            for i, p in enumerate(pl)
        ]
        few, many = sorted((len(po), len(go)))
        options = [list(enumerate(chosen)) for chosen in itertools.permutations(range(many), few)]
        if len(po) > len(go):
            options = [[(i, j) for j, i in pairs] for pairs in options]
        best = min(options, key=lambda pairs: sum(cost[i][j] for i, j in pairs))
        spatial = sum(near[i][j] for i, j in best) / len(go)
    return {
        "format": 1.0, "count": count, "accuracy": accuracy, "spatial": spatial,
        "reward": 0.1 + 0.2 * count + 0.5 * accuracy + 0.2 * spatial,
    }  # fmt: skip


LABELS = ("dog", "cat", "traffic_light", "light", "street_lights", "_")


@st.composite
def scenes(draw, size, max_objects=5, replies=False):
    names = [f"{draw(st.sampled_from(LABELS))}.{i}" for i in range(draw(st.integers(0, max_objects)))]
    objects = []
    for name in names:
        span = []
        for side in size:
            low = draw(st.integers(0, side - 1) | st.floats(0, side - 1))
            high = st.just(side) | st.integers(math.floor(low) + 1, side) | st.floats(low + 0.5, side)
            span.append((low, draw(high)))
        (x1, x2), (y1, y2) = span
        objects.append(obj(name, (x1, y1, x2, y2)))
    relationships = []
    if names:
        end = st.sampled_from(names)
        relationships = draw(st.lists(st.builds(rel, end, st.text(max_size=5), end), max_size=4))
    if replies:  # deviation 5
        said = {(r["subject"], r["predicate"].upper(), r["object"]): r for r in relationships}
        relationships = [r for (a, predicate, b), r in said.items() if a != b and predicate.isalnum()]
    return graph(objects, relationships)


def odd_similarity(a, b):
    """Asymmetric and at times negative, as cosines are: shows the argument order, and clipping."""
    common, union = set(a) & set(b), set(a) | set(b) | {0}
    return {"dog cat": -0.3, "cat dog": 0.4}.get(f"{a} {b}", len(common) / len(union))


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([(200, 100), (37, 911), (640, 480)]))
def test_parity_with_the_released_formula(data, size):
    pred, gold = data.draw(scenes(size, replies=True)), data.draw(scenes(size))
    if gold["relationships"] and not gold["objects"]:
        gold["relationships"] = []
    answer = data.draw(st.sampled_from(["(B) left", " (b) LEFT\n", "(A) right", ""]))
    for similarity in (label_similarity, odd_similarity):
        expected = reference(pred, gold, answer, "(B) left", size, similarity)
        got = spatial_reward(reply(pred, answer), gold_text(gold), size, similarity=similarity)
        assert got.keys() == expected.keys()
        if expected["spatial"] < 0:  # deviation 8
            expected["reward"] -= 0.2 * expected["spatial"]
            expected["spatial"] = 0.0
        assert got == pytest.approx(expected, abs=PARITY)
        assert all(0 <= value <= 1 and type(value) is float for value in got.values())


# ---- terms and gates by hand -------------------------------------------------------------------------------
def test_perfect():
    assert reward_of(GOOD) == pytest.approx({k: 1.0 for k in ZERO}, abs=CIOU_EPS)
    assert list(reward_of(GOOD)) == list(ZERO)


def test_wrong_answer_closes_the_spatial_gate():
    score = score_completion(reply(SCENE, "(A) right"), GOLD, SIZE)
    assert (score.format, score.count, score.accuracy, score.spatial) == (1, 1, 0, 0)
    assert score.reward == pytest.approx(0.3, abs=ROUNDING)
    assert score.reason is None
    assert [m[:2] for m in score.matches] == [(0, 0), (1, 1)]  # still there, for metrics
    assert [v for m in score.matches for v in m[2:]] == pytest.approx([1, 1, 1, 1], abs=CIOU_EPS)


def test_malformed_closes_every_gate():
    assert reward_of(GOOD.replace("</think>", "")) == ZERO
    assert reward_of(GOOD + "!") == ZERO


@pytest.mark.parametrize(
    "answer, right",
    [
        ("(B) left", 1),
        ("  (b) LEFT \n", 1),
        ("(B) Left", 1),
        ("(B)  left", 0),
        ("B", 0),
        ("(B) left.", 0),
        ("", 0),
    ],
)
def test_answer_equality(answer, right):
    assert reward_of(reply(SCENE, answer))["accuracy"] == right


def test_count_by_hand():
    six = graph([obj(f"a.{i}", (i, 0, i + 5, 5)) for i in range(6)])
    gold = gold_text(graph(six["objects"][:4]))
    for n, expected in [(0, 0), (1, 0.25), (3, 0.75), (4, 1), (5, 0.75), (6, 0.5)]:
        assert reward_of(reply(graph(six["objects"][:n])), gold)["count"] == expected
    # Gold with 4 objects and 2 relationships; predicted 3 and 1: 0.7 * 0.75 + 0.3 * 0.5 = 0.675.
    r = rel("a.0", "on", "a.1")
    gold = gold_text(graph(six["objects"][:4], [r, r]))
    count = reward_of(reply(graph(six["objects"][:3], [r])), gold)["count"]
    assert count == pytest.approx(0.675, abs=ROUNDING)
    # No relationship, then five where two are right: 0.7 * 0.75 + 0.3 * max(0, 1 - 3/2) = 0.525.
    five = [rel("a.0", f"on {i}", "a.1") for i in range(5)]
    for relationships in ([], five):
        count = reward_of(reply(graph(six["objects"][:3], relationships)), gold)["count"]
        assert count == pytest.approx(0.525, abs=ROUNDING)
    # Gold without relationships: predicted ones do not count.
    gold = gold_text(graph(six["objects"][:4]))
    assert reward_of(reply(graph(six["objects"][:4], five)), gold)["count"] == 1


def test_spatial_by_hand():
    # In units of a 200 x 100 image: gold (0.1, 0.2, 0.5, 0.8), predicted shifted right by 0.1 (20 pixels).
    # Intersection 0.3 * 0.6 = 0.18, union 0.24 + 0.24 - 0.18 = 0.30, IoU 0.6. rho^2 = 0.01.
    # Hull 0.5 x 0.6: c^2 = 0.61. CIoU = 0.6 - 0.01/0.61 = 0.583607, mapped 0.791803.
    # (In pixels the hull is 100 x 60 and the distance 20: 0.6 - 400/13600, mapped 0.785294, would be wrong.)
    moved, right = graph([MOVED]), pytest.approx(MOVED_SPATIAL, abs=CIOU_EPS)
    assert reward_of(reply(moved), gold_text(graph([DOG])))["spatial"] == right
    # A second gold object that is not predicted halves it, a superfluous prediction changes nothing.
    halved = reward_of(reply(moved), gold_text(graph([DOG, CAT])))
    assert halved["spatial"] == pytest.approx(MOVED_SPATIAL / 2, abs=CIOU_EPS)
    extra = graph([*moved["objects"], obj("tree.1", (0, 0, 5, 5))])
    assert reward_of(reply(extra), gold_text(graph([DOG])))["spatial"] == right


def test_a_match_tells_iou_and_ciou():
    # The left half of the dog: IoU 1/2; centres 0.1 apart, hull 0.4 x 0.6: c^2 = 0.52; w/h 1/3 and 2/3.
    half = graph([obj("dog.1", (20, 20, 60, 80))])
    ((i, j, iou, quality),) = score_completion(reply(half), gold_text(graph([DOG])), SIZE).matches
    v = 4 / math.pi**2 * (math.atan(2 / 3) - math.atan(1 / 3)) ** 2
    assert (i, j, iou) == (0, 0, pytest.approx(1 / 2, abs=CIOU_EPS))
    assert quality == pytest.approx(1 / 2 - 0.01 / 0.52 - v * v / (1 / 2 + v), abs=CIOU_EPS)


def test_labels_steer_the_matching_and_do_not_score():
    # Swapped labels: 2.0 per label outweighs what the boxes can save, so dog meets dog across the image.
    swapped = graph([obj("dog.1", CAT["bbox"]), obj("cat.1", DOG["bbox"])])
    score = score_completion(reply(swapped), gold_text(graph([DOG, CAT])), SIZE)
    assert [m[:2] for m in score.matches] == [(0, 0), (1, 1)] and score.spatial < 0.5
    # With labels that say nothing the boxes decide, and a wrong label costs nothing.
    score = score_completion(reply(swapped), gold_text(graph([DOG, CAT])), SIZE, similarity=lambda a, b: 0.0)
    assert [m[:2] for m in score.matches] == [(0, 1), (1, 0)]
    assert score.spatial == pytest.approx(1, abs=CIOU_EPS)
    # Sign of the box cost: of two equally named predictions the near one is taken.
    near_and_far = graph([obj("dog.1", (150, 60, 190, 90)), obj("dog.2", (22, 20, 100, 80))])
    assert score_completion(reply(near_and_far), gold_text(graph([DOG])), SIZE).matches[0][:2] == (1, 0)
    # Balance: the right box instead of one far away (CIoU -0.433) saves 1.433 / 2 = 0.717. A label 0.63
    # alike costs 2 * 0.37 = 0.74, which is too much for that, one that is 0.65 alike costs 0.70.
    pred = reply(graph([obj("dog.1", (180, 90, 199, 99)), obj("cow.1", DOG["bbox"])]))
    gold = gold_text(graph([DOG]))
    for alike, chosen in ((0.63, 0), (0.65, 1)):
        score = score_completion(pred, gold, SIZE, similarity=lambda a, b, s=alike: 1.0 if a == b else s)
        assert score.matches[0][0] == chosen
    # A cosine below 0 counts as it is: 2 * 1.5 for the right box, against 2 * 1 + 0.717.
    score = score_completion(pred, gold, SIZE, similarity=lambda a, b: 0.0 if a == b else -0.5)
    assert score.matches[0][0] == 0


def test_similarity_sees_clean_labels_predicted_first():
    seen = []
    pred, gold = graph([obj("Traffic_Light.3", (0, 0, 9, 9))]), graph([obj("dog.12", (0, 0, 9, 9))])
    spatial_reward(reply(pred), gold_text(gold), SIZE, similarity=lambda a, b: seen.append((a, b)) or 1.0)
    assert seen == [("traffic light", "dog")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0, 7.0, np.float32(0.5), np.array(0.5)])
def test_strange_similarities_change_no_single_match(value):
    one = graph([DOG])
    got = reward_of(reply(one), gold_text(one), similarity=lambda a, b: value)
    assert got["spatial"] == pytest.approx(1, abs=CIOU_EPS)


def test_one_unknown_label_does_not_disturb_the_others():
    def similarity(a, b):
        return math.nan if a == "blorp" else float(a == b)

    pred = graph([obj("blorp.1", CAT["bbox"]), DOG])
    score = score_completion(reply(pred), gold_text(graph([DOG, CAT])), SIZE, similarity=similarity)
    assert [m[:2] for m in score.matches] == [(0, 1), (1, 0)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_unknown_label_takes_no_place_by_its_box(value):
    # It counts as unlike: 2 for the right box, against 0.717 for the right label far away.
    pred = graph([obj("blorp.1", DOG["bbox"]), obj("dog.1", (180, 90, 199, 99))])
    alike = {("blorp", "dog"): value, ("dog", "dog"): 1.0}
    score = score_completion(reply(pred), gold_text(graph([DOG])), SIZE, similarity=lambda *pair: alike[pair])
    assert score.matches[0][:2] == (1, 0)


def test_empty_scenes():
    empty, one = graph(), graph([DOG])
    assert reward_of(reply(empty), gold_text(empty)) == {k: 1.0 for k in ZERO}
    got = reward_of(reply(one), gold_text(empty))
    assert (got["count"], got["accuracy"], got["spatial"]) == (0, 1, 0)
    got = reward_of(reply(empty), gold_text(one))
    assert (got["count"], got["accuracy"], got["spatial"]) == (0, 1, 0)
    assert score_completion(reply(empty), gold_text(one), SIZE).matches == ()
    # Gold that kept a relationship but no object: nothing can be right about it.
    assert reward_of(reply(empty), gold_text(graph([], [rel("a.1", "on", "b.1")])))["spatial"] == 0
    assert reward_of(reply(empty, "(A) up"), gold_text(empty))["spatial"] == 0


def test_absent_lists_are_empty():
    assert reward_of(reply('{"objects": []}'), gold_text(graph())) == {k: 1.0 for k in ZERO}
    assert reward_of(reply('{"relationships": []}'), gold_text(graph())) == {k: 1.0 for k in ZERO}
    assert reason_of(reply("{}")) == "bad_scene"


def test_unknown_keys_beside_objects_are_left_alone():
    scene = {**SCENE, "note": {"deep": [1, 2]}, "relationships": [{**SCENE["relationships"][0], "why": 1}]}
    assert reason_of(reply(scene)) is None


def test_weights_apply_and_terms_do_not_change():
    weights = Weights(format=0, count=0.4, accuracy=0, spatial=0.6, count_objects=1, count_relationships=0)
    pred = graph([DOG])
    got = reward_of(reply(pred), weights=weights)
    assert got["count"] == 0.5 and got["format"] == got["accuracy"] == 1
    assert got["reward"] == pytest.approx(0.4 * 0.5 + 0.6 * got["spatial"], abs=ROUNDING)


@pytest.mark.parametrize(
    "bad",
    [
        {"format": -0.1}, {"spatial": math.nan}, {"count": math.inf}, {"accuracy": "0.5"}, {"accuracy": None},
        {"count_relationships": -1e-9},
    ],
)  # fmt: skip
def test_weights_refuse(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"weight {name}: expected a finite number >= 0, got"):
        Weights(**bad)


@pytest.mark.parametrize("bad", [{"accuracy": 0.5 + 1e-8}, {"spatial": 0.3}, {"count_objects": 0.7 + 1e-8}])
def test_weights_refuse_sums_above_one(bad):
    with pytest.raises(ValueError, match="<= 1, got 1."):
        Weights(**bad)


def test_a_hair_above_one_is_cut_off():
    weights = Weights(count_objects=0.7 + 5e-10)  # within the tolerance of the sums
    assert reward_of(GOOD, weights=weights)["count"] == 1
    weights = Weights(format=0.3 + 5e-10, spatial=0)  # CIoU's EPS would take more than the hair
    assert reward_of(GOOD, weights=weights)["reward"] == 1


def test_weights_tolerate_float_sums_and_are_frozen():
    Weights(format=0.1, count=0.2, accuracy=0.3, spatial=0.4)
    Weights(format=0.1, count=0.7, accuracy=0.1, spatial=0.1)
    Weights(0, 0, 0, 0, 0, 0)
    with pytest.raises(AttributeError):
        Weights().format = 0.5


# ---- rejections --------------------------------------------------------------------------------------------
def with_objects(*objects):
    return reply(json.dumps({"objects": list(objects)}))


def with_box(text):
    return reply(f'{{"objects": [{{"id": "dog.1", "bbox": {text}}}]}}')


def with_relationship(text):
    return reply(f'{{"objects": {json.dumps([DOG, CAT])}, "relationships": [{text}]}}')


def with_relationships(*triplets):
    return reply(graph([DOG, CAT], [rel(*triplet) for triplet in triplets]))


OBSERVE, SCENE_BLOCK, THINK, ANSWER = GOOD.split("\n")
BLANKS = ("", " ", "\n\t", "\u00a0\u3000", "\u200b", "\ufeff\u2060")
REJECTED = {
    "not_text": [None, 3, b"<observe>", ["x"], float("nan")],
    "too_long": [" " * MAX_CHARS + GOOD, "<" * 8_000_000],
    "missing_tag": [
        "", "dog", GOOD[: GOOD.index("</answer>")], GOOD.replace("<observe>", ""),
        OBSERVE + SCENE_BLOCK + ANSWER, GOOD.replace("<answer>", "<ANSWER>"),
        GOOD.replace("<think>", "< think>"),
    ],
    "repeated_tag": [
        GOOD + ANSWER, GOOD.replace("<think>t", "<think>in <scene> I see"), GOOD + "</answer>",
        GOOD.replace("<observe>", "<observe><observe>"), GOOD.replace(">o<", "></think><"),
    ],
    "tag_order": [
        "\n".join((OBSERVE, THINK, SCENE_BLOCK, ANSWER)), "\n".join((ANSWER, OBSERVE, SCENE_BLOCK, THINK)),
        "</observe>o<observe>" + "".join((SCENE_BLOCK, THINK, ANSWER)),
        GOOD.replace("<think>t</think>", "").replace("<answer>", "<think><answer>") + "</think>",
    ],
    "stray_text": [
        "Sure! " + GOOD, GOOD + " Done.", f"{OBSERVE}{SCENE_BLOCK}so{THINK}{ANSWER}", GOOD + "<|im_end|>",
        GOOD + "\0", GOOD + "</ answer>", f"{OBSERVE},{SCENE_BLOCK}{THINK}{ANSWER}",
    ],
    "empty_block": [
        *(GOOD.replace(f">{letter}<", f">{blank}<") for letter in "ot" for blank in BLANKS),
    ],
    "too_deep": [reply("[" * 100), reply('{"a":' * 60 + "1" + "}" * 60), with_box("[" * 40 + "]" * 40)],
    "bad_json": [
        reply(""), reply("dog at [1, 2]"), reply("{'objects': []}"), reply('{"objects": [}'),
        reply('{"objects": []} x'), reply("\\"),
        with_box("[0, 0, NaN, 9]"), with_box("[0, 0, Infinity, 9]"), with_box("[-Infinity, 0, 9, 9]"),
        reply('```json\n{"objects": []}\n```'), reply('{"objects": [], "x": NaN}'), reply('{"a": "\0"}'),
        reply('{"a'), with_box("[0, 0, 01, 9]"), with_box("[0, 0, 0x9, 9]"), with_box("[0, 0, +9, 9]"),
        with_box("[0, 0, 9., 9]"),
    ],
    "duplicate_key": [
        reply('{"objects": [], "objects": []}'),
        reply('{"objects": [{"id": "a.1", "id": "a.2", "bbox": [0,0,9,9]}]}'),
        reply('{"objects": [], "x": {"a": 1, "\\u0061": 2}}'),
    ],
    "bad_scene": [
        reply("{}"), reply("[]"), reply("3"), reply("null"), reply('"dog"'), reply('{"objects": {}}'),
        reply('{"objects": null}'), reply('{"objects": [], "relationships": "none"}'), reply("true"),
    ],
    "too_many_objects": [with_objects(*[obj(f"a.{i}", (0, 0, 9, 9)) for i in range(MAX_OBJECTS + 1)])],
    "bad_object": [
        with_objects({"id": "dog.1"}), with_objects({**DOG, "color": "red"}), with_objects("dog.1"),
        with_objects(None), with_objects([DOG]), with_objects({}),
        with_objects({"ID": "dog.1", "bbox": [0, 0, 9, 9]}),
    ],
    "bad_id": [
        with_objects(obj(name, (0, 0, 9, 9))) for name in (
            "dog", "dog.", ".1", "dog.1.2", "dog 1", "dog.1 ", "dog.1\n", "a light.1", "t-shirt.1", "dog.x",
            "hündin.1", "dog.١", "dog.-1", "a" * 200 + ".1", "a." + "1" * 200, "", 7, None, ["a.1"], {},
        )
    ],
    "duplicate_id": [with_objects(DOG, DOG), with_objects(DOG, CAT, obj("dog.1", (0, 0, 9, 9)))],
    "bad_box": [
        with_box(text) for text in (
            "[9, 0, 0, 9]", "[0, 9, 9, 0]", "[5, 0, 5, 9]", "[0, 5, 9, 5]", "[0, 0, 0, 0]",
            "[80, 70, 20, 30]", "[0, 0, 9]", "[0, 0, 9, 9, 9]", "[]", "null", '"0 0 9 9"', '[0, 0, "9", 9]',
            "[0, 0, true, 9]",
            "[false, false, true, true]", "[0, 0, null, 9]", "[0, 0, 1e999, 9]", "[-1e999, 0, 9, 9]",
            "[[0, 0, 9, 9]]", f"[0, 0, {10**400}, 9]", f"[0, 0, {'9' * 50_000}, 9]", "[0, 0, 9, {}]", "{}",
            "[0, 0, [9], 9]",
        )
    ],
    "box_outside": [
        with_box("[200, 0, 210, 9]"), with_box("[300, 300, 310, 310]"), with_box("[-20, -20, -1, -1]"),
        with_box("[-20, 0, 0, 9]"), with_box("[0, 100, 9, 120]"), with_box("[0, -9, 9, 0]"),
        with_box("[1e300, 0, 1e301, 9]"), with_box(f"[{10**30}, 0, {10**31}, 9]"),
        with_objects(DOG, obj("cat.1", (120, 150, 130, 160))),
    ],
    "too_many_relationships": [
        reply(json.dumps({"objects": [DOG], "relationships": [{}] * (rewards.MAX_RELATIONSHIPS + 1)}))
    ],
    "bad_relationship": [
        with_relationship(text) for text in (
            '{"subject": "dog.1", "object": "dog.1"}',
            '{"subject": "dog.1", "predicate": 3, "object": "dog.1"}', '"on"', "{}",
            '{"subject": "dog", "predicate": "on", "object": "dog.1"}', '["dog.1", "on", "dog.1"]', "null",
            '{"subject": "dog.1", "predicate": "on", "object": "dog.1\\n"}',
            '{"subject": ["dog.1"], "predicate": "", "object": ""}',
        )
    ],
    "dangling_relationship": [
        with_relationship('{"subject": "dog.1", "predicate": "on", "object": "cow.1"}'),
        with_relationship('{"subject": "Dog.1", "predicate": "on", "object": "dog.1"}'),
        reply('{"relationships": [{"subject": "dog.1", "predicate": "on", "object": "cat.1"}]}'),
    ],
    "self_relationship": [
        with_relationships(("dog.1", "on", "dog.1")),
        with_relationships(("dog.1", "on", "cat.1"), ("cat.1", "beside", "cat.1")),
    ],
    "empty_predicate": [with_relationships(("dog.1", blank, "cat.1")) for blank in BLANKS],
    "duplicate_relationship": [
        with_relationships(("dog.1", first, "cat.1"), ("cat.1", "on", "dog.1"), ("dog.1", second, "cat.1"))
        for first, second in (("on", "on"), ("On", "on "), ("left of", "LEFT  of"), ("left_of", "left of"))
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", REJECTION_REASONS)
def test_each_rejection_has_its_reason(reason):
    for text in REJECTED[reason]:
        assert reason_of(text) == reason, repr(text)[:200]
    assert set(REJECTED) == set(REJECTION_REASONS)


@pytest.mark.parametrize(
    "text",
    [
        f" \n\t{GOOD}\n\n", GOOD.replace("\n", ""), GOOD.replace("\n", " \t\r\n\u3000"),
        GOOD.replace(">o<", ">.<"), GOOD.replace(">t<", "> 1 < 2, </ thinking> <b> \ud800 \0 <"),
        GOOD.replace("<scene>", "<scene> \n ").replace("</scene>", "\n</scene>"),
        reply(json.dumps(SCENE, indent=2)), reply(json.dumps(SCENE).replace("dog", "\\u0064og")),
        with_box("[0, 0, 200, 100]"), with_box("[0, 0, 1e-300, 5e-324]"), with_box("[0.5, 1e0, 1.5E1, 9.25]"),
        with_box("[-0, -0.0, 9, 9]"), with_objects(obj("_.0", (0, 0, 9, 9)), obj("_.00", (0, 0, 9, 9))),
        with_relationship('{"subject": "dog.1", "predicate": "[[{", "object": "cat.1"}'),
        with_relationships(("dog.1", "on", "cat.1"), ("cat.1", "on", "dog.1"), ("dog.1", "by", "cat.1")),
        with_relationship(json.dumps(rel("dog.1", "[" * 5000, "cat.1"))),
        with_relationship('{"subject": "dog.1", "predicate": "\\"\\\\", "object": "cat.1"}'),
    ],
)  # fmt: skip
def test_accepted(text):
    assert reason_of(text) is None


def compact(scene):
    return reply(json.dumps(scene, separators=(",", ":")))


def distinct(n):
    return [rel("dog.1", str(i), "cat.1") for i in range(n)]


def nested(depth):
    return reply('{"objects":[],"x":' + "[" * (depth - 1) + "]" * (depth - 1) + "}")


@pytest.mark.parametrize(
    "reason, text, limit",
    [
        ("too_long", GOOD.ljust, 65_536), ("too_deep", nested, 32),
        ("too_many_objects", lambda n: compact(graph(many(n))), 256),
        ("too_many_relationships", lambda n: compact(graph([DOG, CAT], distinct(n))), 1024),
        ("bad_id", lambda n: with_objects(obj("a" * n + ".1", (0, 0, 9, 9))), 80),
        ("bad_id", lambda n: with_objects(obj("a." + "1" * n, (0, 0, 9, 9))), 9),
    ],
)  # fmt: skip
def test_limits_are_where_they_are_said_to_be(reason, text, limit):
    assert reason_of(text(limit)) is None
    assert reason_of(text(limit + 1)) == reason


def test_overhanging_boxes_are_clipped():
    # (-50, -50, 100, 80) cut to (0, 0, 100, 80) scores like the latter.
    over, cut = with_box("[-50, -50, 100, 80]"), with_box("[0, 0, 100, 80]")
    assert reward_of(over) == reward_of(cut)
    full = gold_text(graph([obj("dog.1", (0, 0, 200, 100))]))
    huge = with_box(f"[-1e300, -5, 1e308, {10**300}]")
    assert reward_of(huge, full)["spatial"] == pytest.approx(1, abs=CIOU_EPS)
    # Gold stays as it is, as in the released code.
    gold = gold_text(graph([obj("dog.1", (-10, 0, 100, 100))]))
    expected = (reference_ciou((0, 0, 0.5, 1), (-0.05, 0, 0.5, 1)) + 1) / 2
    assert reward_of(with_box("[0, 0, 100, 100]"), gold)["spatial"] == pytest.approx(expected, abs=PARITY)


def test_slim_boxes_far_apart_end_at_zero():
    pred, gold = graph([obj("dog.1", (0, 0, 60, 0.01))]), graph([obj("dog.1", (199.99, 70, 200, 100))])
    assert reference(pred, gold, "a", "a", SIZE, label_similarity)["spatial"] < -0.1
    got = reward_of(reply(pred, "a"), gold_text(gold, "a"))
    assert got["spatial"] == 0 and got["reward"] == pytest.approx(0.8, abs=ROUNDING)


# ---- ground truth and image size ---------------------------------------------------------------------------
def test_parse_ground_truth():
    scene, answer = parse_ground_truth(GOLD)
    assert scene == SCENE and answer == "(B) left"
    scene["objects"].clear()  # a caller may change what it got
    assert parse_ground_truth(GOLD)[0] == SCENE
    dangling = graph([DOG], [rel("dog.1", "on", "hill.1")])
    assert parse_ground_truth(gold_text(dangling))[0] == dangling


@pytest.mark.parametrize(
    "gold, message",
    [
        (None, "text"), ("", "<scene>"), ("(B) left", "<scene>"), (GOLD + "x", "white space"),
        (GOLD + GOLD, "one <scene>"),
        (gold_text(SCENE, " "), "answer"), ("<scene>{</scene><answer>a</answer>", "JSON"),
        (gold_text({}), "objects"), (gold_text(graph([obj("dog.1", (9, 9, 0, 0))])), "x1 < x2"),
        (gold_text(graph([DOG, DOG])), "dog.1 twice"),
        (gold_text(graph([obj("street light.1", (0, 0, 9, 9))])), "street light.1"),
        (gold_text(graph([obj("dog.1", (0, 0, math.nan, 9))])), "NaN"),
        (gold_text(graph([DOG], [{"subject": "dog.1"}])), "subject, predicate"),
    ],
)  # fmt: skip
def test_bad_ground_truth_is_an_error(gold, message):
    with pytest.raises(ValueError, match=message):
        parse_ground_truth(gold)
    for completion in (GOOD, "", None):
        with pytest.raises(ValueError, match="ground truth"):
            reward_of(completion, gold)


def test_gold_box_outside_the_image_is_an_error():
    with pytest.raises(ValueError, match=r"ground truth.*100 x 50.*cat.1"):
        reward_of(GOOD, GOLD, (100, 50))


@pytest.mark.parametrize(
    "size",
    [
        None, 5, (200,), (200, 100, 3), (0, 100), (200, -1), (math.nan, 100), (200, math.inf),
        (math.inf, 100), "ab", {}, "12", ("200", "100"), "200x100", (True, True), (200, True), (1e308, 100),
        (200, 10**400), (10**5000, 1), (200, -(10**400)), (0.5, 100), (1_000_001, 100), (None, 100),
        ((200, 100), (200, 100)), np.array([[200, 100]]), np.zeros((40, 40)), {"width": 200, "height": 100},
    ],
)  # fmt: skip
def test_bad_image_size_is_an_error(size):
    with warnings.catch_warnings(), pytest.raises(ValueError, match="image_size: expected") as caught:
        warnings.simplefilter("error")
        reward_of(GOOD, GOLD, size)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("far", ["1e308", "-1e308", "1e7", "1" + "0" * 400, "1" + "0" * 5000, "1" + "0" * 30])
def test_huge_gold_boxes_are_an_error(far):
    """In a reply they are clipped or malformed; squares of them would overflow."""
    low, high = (far, "9") if far.startswith("-") else ("0", far)
    text = f'{{"objects": [{{"id": "dog.1", "bbox": [{low}, 0, {high}, 9]}}]}}'
    with warnings.catch_warnings(), pytest.raises(ValueError, match="ground truth: expected") as caught:
        warnings.simplefilter("error")
        reward_of(GOOD, f"<scene>{text}</scene><answer>(B) left</answer>")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert all(0 <= value <= 1 for value in reward_of(reply(text)).values())


def test_image_sizes_of_other_types():
    for size in ([200, 100], np.array([200, 100]), (np.int64(200), 100.0)):
        assert reward_of(GOOD, GOLD, size) == reward_of(GOOD)


# ---- parsing -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>A</answer>", "A"), ("<answer>\n (A) x </answer> tail", "(A) x"), ("", ""), (None, ""),
        (7, ""), ("<answer>A", ""), ("A</answer>", ""), ("</answer>A<answer>", ""), ("<answer></answer>", ""),
        ("<answer>A</answer><answer>B</answer>", "B"), ("<answer>A</answer> <answer>B", "A"),
        ("<answer>A</answer></answer>", "A"), ("<answer>A<answer>B</answer>", "B"),
        ("x" * 10**6 + "<answer>A</answer>", "A"), ("<answer>A</answer>" + "x" * 10**6, ""),
    ],
)  # fmt: skip
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_parse_scene():
    assert parse_scene(GOOD) == parse_scene(GOLD) == parse_scene(json.dumps(SCENE)) == SCENE
    assert parse_scene(SCENE_BLOCK.replace("dog", "cow") + GOOD) == SCENE  # the last block
    assert parse_scene('{"objects": []}') == graph()
    for text in (None, b"{}", "", "x", "<scene>", "<scene>[]</scene>", " " * (MAX_CHARS + 1)):
        assert parse_scene(text) is None


# ---- label similarity --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "a, b, expected",
    [
        ("dog", "dog", 1), ("Dog", "dogs", 1), ("traffic_light", "traffic-light", 1),
        ("Traffic Light", "traffic_lights", 1),
        ("fire hydrant", "firehydrant", 1), ("bus", "buses", 1), ("berry", "berries", 1),
        ("cookie", "cookies", 1),
        ("knife", "knives", 1), ("shelf", "shelves", 1), ("man", "men", 1), ("snow_woman", "snow_women", 1),
        ("glass", "glasses", 1),
        ("person", "people", 1), ("child", "children", 1), ("", "", 1), ("_", "-", 1), ("", "dog", 0),
        ("dog", "cat", 0), ("car", "cart", 0), ("car", "scar", 0), ("table_lamp", "table", 0),
        ("bus", "bush", 0), ("traffic_light", "light", 2 / 3), ("lights", "traffic light", 2 / 3),
        ("red car", "blue cars", 1 / 2),
        ("big red car", "red car", 4 / 5), ("red red car", "red car", 1), ("table lamp", "floor_lamp", 1 / 2),
    ],
)  # fmt: skip
def test_label_similarity(a, b, expected):
    assert label_similarity(a, b) == expected
    assert label_similarity(b, a) == label_similarity(a, b)


words = st.text(alphabet="abesyf_- ", max_size=12) | st.text(max_size=8)


@given(words, words)
def test_label_similarity_properties(a, b):
    value = label_similarity(a, b)
    assert 0 <= value <= 1 and value == label_similarity(b, a) and label_similarity(a, a) == 1
    assert label_similarity(a.upper(), a.upper().replace("_", "-")) == 1


def test_spacy_similarity_uses_the_vectors_of_the_named_model(monkeypatch):
    loaded = []

    class Doc:
        def __init__(self, text):
            self.text = text

        def similarity(self, other):
            return np.float32(0.25 if self.text == other.text else -0.5)

    spacy = types.SimpleNamespace(load=lambda name, disable: loaded.append(name) or Doc)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    similarity = rewards.spacy_similarity("some_model")
    assert loaded == ["some_model"]
    assert similarity("Traffic_Light", "traffic light") == 0.25 and similarity("dog", "cat") == -0.5
    assert reward_of(GOOD, similarity=similarity)["reward"] == pytest.approx(1, abs=CIOU_EPS)


# ---- vanilla -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, format_, accuracy",
    [
        ("<think>x</think> <answer>(b) Left</answer>\n", 1, 1), ("<think>x</think><answer>A</answer>", 1, 0),
        ("<answer>(B) left</answer>", 0, 1), ("<think>x</think>so<answer>(B) left</answer>", 0, 1),
        ("(B) left", 0, 0), ("<answer>(B) left</answer><think>x</think>", 0, 1), ("", 0, 0), (None, 0, 0),
        ("<think>x</think><answer></answer>", 1, 0), ("<think> </think><answer>(B) left</answer>", 0, 1),
        ("<think>x</think><answer>A</answer><answer>(B) left</answer>", 0, 1), (GOOD, 0, 1),
    ],
)  # fmt: skip
def test_vanilla_is_ungated(text, format_, accuracy):
    for gold in (GOLD, "(B) left", " (b) LEFT "):
        expected = {"reward": (format_ + accuracy) / 2, "format": format_, "accuracy": accuracy}
        assert vanilla_reward(text, gold) == expected


def test_vanilla_refuses_an_empty_gold_answer():
    for gold in ("", "  ", None):
        with pytest.raises(ValueError, match="answer"):
            vanilla_reward(GOOD, gold)


# ---- properties --------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(scenes(SIZE, 6), scenes(SIZE, 6), st.randoms())
def test_order_of_objects_does_not_matter(pred, gold, rng):
    before = reward_of(reply(pred), gold_text(gold))
    for scene in (pred, gold):
        rng.shuffle(scene["objects"])
        rng.shuffle(scene["relationships"])
    assert reward_of(reply(pred), gold_text(gold)) == pytest.approx(before, abs=PARITY)


@settings(deadline=None)
@given(st.floats(1, 79), st.floats(1, 79), st.booleans())
def test_single_object_is_monotonic_in_iou(a, b, horizontal):
    """IoU falls as a box slides off along an axis: so must the reward."""

    def slid(shift):
        x, y = (shift, 0) if horizontal else (0, shift / 4)
        scene = graph([obj("dog.1", (20 + x, 20 + y, 100 + x, 80 + y))])
        return reward_of(reply(scene), gold_text(graph([DOG])))

    near, far = sorted((a, b))
    assert slid(0)["reward"] >= slid(near)["reward"] - ROUNDING >= slid(far)["reward"] - 2 * ROUNDING
    if far - near > 0.01:
        assert slid(near)["spatial"] > slid(far)["spatial"]


def never_raises(text):
    for result in (reward_of(text), vanilla_reward(text, GOLD)):
        assert all(0 <= value <= 1 and math.isfinite(value) for value in result.values())
    assert (score_completion(text, GOLD, SIZE).reason is None) == (reward_of(text)["format"] == 1)
    assert isinstance(extract_answer(text), str)
    assert parse_scene(text) is None or set(parse_scene(text)) == {"objects", "relationships"}


TAGS = [f"<{slash}{name}>" for name in rewards.BLOCKS for slash in ("", "/")]
SNIPPETS = [*TAGS, *'[]{}",:-\\\0\ud800', '{"objects":', '"bbox"', '"id"', "dog.1", "NaN", "1e999", "true"]


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.binary().map(lambda b: b.decode("latin-1"))
    | st.binary().map(lambda b: b.decode(errors="surrogateescape"))
    | st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=3)).map("".join)
)
def test_any_text_is_scored(text):
    never_raises(text)
    never_raises(reply(text))


inserts = st.sampled_from(SNIPPETS) | st.text(max_size=3)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 8), inserts), min_size=1, max_size=4))
def test_mutated_completions_are_scored(edits):
    text = GOOD
    for start, length, insert in edits:
        text = text[:start] + insert + text[start + length :]
    never_raises(text)


KEYS = ("objects", "relationships", "id", "bbox", "subject", "predicate", "object")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["dog.1", "cat.1", "x", ""]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
PLACES = [("objects", 0, "id"), ("objects", 0, "bbox"), ("objects", 0), ("relationships", 0), ("objects",)]


@settings(max_examples=300, deadline=None)
@given(json_values, st.sampled_from(PLACES))
def test_any_json_in_any_place_is_scored(value, path):
    scene = copy.deepcopy(SCENE)
    place = scene
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    never_raises(reply(json.dumps(scene)))
    never_raises(reply(json.dumps(value)))


# ---- hostile texts -----------------------------------------------------------------------------------------
def long_label(i):
    return "_".join("abcdefgh"[(i >> (3 * k)) % 8] * (1 + k) for k in range(6))


FULL = MAX_CHARS - len(reply("")) - 20
HOSTILE = {
    "8 MB of nothing": " " * 8_000_000,
    "8 MB of tags": "<observe>" * 1_000_000,
    "8 MB of closing tags": "</answer>" * 1_000_000,
    "8 MB in the scene": reply("[" * 8_000_000),
    "8 MB in think": GOOD.replace(">t<", ">" + "t" * 8_000_000 + "<"),
    "8 MB of surrogates": "\ud800" * 4_000_000,
    "10,000 objects": reply(json.dumps({"objects": many(10_000)})),
    "100,000 nested brackets": reply("[" * 100_000 + "]" * 100_000),
    "100,000 nested objects": reply('{"a":' * 100_000),
    "100,000 digits": with_box("[0, 0, " + "9" * 100_000 + ", 9]"),
    "tags to the cap": "<answer>" * (MAX_CHARS // 8),
    "closing tags to the cap": "</answer>" * (MAX_CHARS // 9),
    "pairs to the cap": "<answer></answer>" * (MAX_CHARS // 17),
    "brackets to the cap": reply("[" * FULL),
    "closed brackets to the cap": reply("[]," * (FULL // 3)),
    "quotes to the cap": reply('"' * FULL),
    "escaped quotes to the cap": reply('"' + '\\"' * (FULL // 2 - 1)),
    "escaped quotes without an opening": reply('\\"' * (FULL // 2)),
    "backslashes to the cap": reply('"' + "\\" * (FULL - 1)),
    "digits to the cap": reply("9" * FULL),
    "numbers to the cap": with_box("[" + ",".join(["1e5"] * (FULL // 5)) + "]"),
    "negative digits in a box": with_box("[0, 0, -" + "9" * (FULL - 100) + ", 9]"),
    "fraction to the cap": with_box("[0, 0, 0." + "9" * (FULL - 100) + ", 9]"),
    "exponent to the cap": with_box("[0, 0, 1e" + "9" * (FULL - 100) + ", 9]"),
    "keys to the cap": reply("{" + ",".join(f'"{i}":1' for i in range(FULL // 9)) + "}"),
    "white space to the cap": GOOD.replace("\n", "\n" * (FULL // 5)),
    "lone angle brackets": "<" * MAX_CHARS,
    "label to the cap": with_objects(obj("a" * (FULL - 100) + ".1", (0, 0, 9, 9))),
    "predicate to the cap": with_relationship(json.dumps(rel("dog.1", "x" * (FULL - 200), "dog.1"))),
    "most objects": with_objects(*many(MAX_OBJECTS)),
    "most objects, all labels different": with_objects(
        *[obj(f"{long_label(i)}.{i}", (i % 90, 0, 100 + i % 90, 50)) for i in range(MAX_OBJECTS)]),
    "most relationships": reply(json.dumps(
        {"objects": [DOG], "relationships": [rel("dog.1", "", "dog.1")] * 1000}, separators=(",", ":"))),
}  # fmt: skip
YARD = "[" + ",".join(['[1, 2.5, "ab"]'] * 4300) + "]"  # 64,500 characters


def yardstick():
    """A fixed piece of work of the same kinds: a regular expression, JSON, plain Python over a long text."""
    return sum(len(word) for word in re.findall(r"[a-z]+|\d+|,", YARD)) + len(json.loads(YARD))


def cpu_time(work, rounds):
    """The least CPU seconds of some rounds: what other processes take of the clock does not count."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


CROWD = many(8, "light") + [obj(f"{long_label(7 * i)}.{i}", (i, 0, i + 9, 9)) for i in range(16)]
CROWDED = gold_text(graph(CROWD))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_cost_little(name):
    text = HOSTILE[name]

    def work():
        label_similarity.cache_clear()
        score_completion(text, CROWDED, SIZE)
        vanilla_reward(text, GOLD)
        extract_answer(text)
        parse_scene(text)

    work()  # scipy is imported, gold is parsed
    # The dearest text takes 4.5 yardsticks, a scan of all pairs of characters hundreds.
    spent, yard = cpu_time(work, 3), cpu_time(yardstick, 5)
    assert spent < 20 * yard, f"{spent / yard:.1f} yardsticks"
    never_raises(text)


def test_caches_are_bounded():
    for cached in (label_similarity, rewards._gold):
        assert cached.cache_info().maxsize is not None
    assert not rewards.OBJECT_ID.fullmatch("a" * 81 + ".1")  # no long labels in them either


# ---- adapters ----------------------------------------------------------------------------------------------
WRONG = reply(SCENE, "(A) right")
EXPECTED = [1.0, 0.3, 0.0]
TEXTS = [GOOD, WRONG, "no"]
STATED = "Image size: (200 x 100)\n\nWhere is the dog?"


def chat(text):
    return [{"role": "assistant", "content": text}]


def parts(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize("wrap", [str, chat, parts])
def test_trl_completions(wrap):
    got = trl_spatial_reward(
        prompts=["p"] * 3, completions=[wrap(t) for t in TEXTS], completion_ids=[[1]] * 3,
        answer_option_text=[GOLD] * 3, image_size=[SIZE] * 3, trainer_state=None, log_extra=print,
        category=["relation"] * 3,
    )  # fmt: skip
    assert got == pytest.approx(EXPECTED, abs=CIOU_EPS) and all(type(r) is float for r in got)


@pytest.mark.parametrize(
    "columns",
    [
        {"image_size": [SIZE]}, {"image_size": [[200, 100]], "problem": ["Image size: (1 x 1)"]},
        {"image": [Image.new("RGB", SIZE)]}, {"images": [[Image.new("RGB", SIZE)]]},
        {"images": [Image.new("RGB", SIZE)]},
        {"problem": [STATED]}, {"prompts": [STATED]}, {"prompts": [[{"role": "user", "content": STATED}]]},
        {"prompts": [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": STATED}]}]]},
        {"problem": ["Image size: 200 x 100"]},
        # What the prompt says is the frame the model answers in, also where the image was resized since.
        {"problem": [STATED], "image": [Image.new("RGB", (400, 300))]},
    ],
)  # fmt: skip
def test_trl_image_size(columns):
    gold = gold_text(graph([DOG]))
    got = trl_spatial_reward(completions=[reply(graph([MOVED]))], answer_option_text=[gold], **columns)
    assert got == [pytest.approx(0.8 + 0.2 * MOVED_SPATIAL, abs=CIOU_EPS)]


def test_trl_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="image_size.*category"):
        trl_spatial_reward(completions=[GOOD], answer_option_text=[GOLD], category=["relation"])
    with pytest.raises(ValueError):
        trl_spatial_reward(completions=[GOOD, GOOD], answer_option_text=[GOLD], image_size=[SIZE])


def as_columns():
    """(name, completions, golds, columns): what trainers and data sets hold their columns in."""
    import pyarrow

    golds, sizes = [GOLD] * 3, [list(SIZE)] * 3
    images = [np.zeros((SIZE[1], SIZE[0], 3), np.uint8)] * 3
    mapping = {"scene": SCENE, "answer": "(B) left"}
    yield "numpy", np.array(TEXTS), np.array(golds), {"image_size": np.array(sizes)}
    yield "objects", np.array(TEXTS, object), np.array(golds, object), {"image_size": np.array(sizes, object)}
    yield "arrow", pyarrow.array(TEXTS), pyarrow.array(golds), {"image_size": pyarrow.array(sizes)}
    yield (
        "arrow mappings",
        TEXTS,
        pyarrow.array([mapping] * 3),
        {"image_size": pyarrow.chunked_array([sizes])},
    )
    yield "numpy images", TEXTS, golds, {"image": images}
    yield "array of images", TEXTS, golds, {"image": np.stack(images)}
    yield "lists of images", TEXTS, golds, {"images": [[image] for image in images]}
    yield "arrays of PIL images", TEXTS, golds, {"images": [np.array([Image.new("RGB", SIZE)], object)] * 3}
    yield "grey", TEXTS, golds, {"image": [image[..., 0] for image in images]}
    yield "channels first", TEXTS, golds, {"image": [image.transpose(2, 0, 1) for image in images]}
    yield "rows of images", TEXTS, golds, {"images": [image[None] for image in images]}
    yield "mappings", TEXTS, [mapping] * 3, {"image_size": [dict(width=200, height=100)] * 3}
    yield "JSON", TEXTS, [json.dumps(mapping)] * 3, {"image_size": ["[200, 100]"] * 3}
    inner = {"scene": json.dumps(SCENE), "answer": "(B) left"}
    yield "JSON in JSON", TEXTS, [json.dumps(inner)] * 3, {"image_size": sizes}
    for text in ("200x100", "(200, 100)", " 200 x 100 ", "200,100", "200X100", "200 × 100"):
        yield text, TEXTS, golds, {"image_size": [text] * 3}
    nothing = {"image_size": [None, math.nan, ""], "problem": np.array([STATED] * 3)}
    yield "no sizes", TEXTS, golds, nothing


@pytest.mark.parametrize("case", list(as_columns()), ids=lambda case: case[0])
def test_columns_of_any_kind(case):
    _, completions, golds, columns = case
    got = trl_spatial_reward(completions, golds, **columns)
    assert got == pytest.approx(EXPECTED, abs=CIOU_EPS)
    if "image_size" in columns and len(columns) == 1:  # the other two take their rows one at a time
        for completion, gold, size, expected in zip(
            completions, golds, columns["image_size"], EXPECTED, strict=True
        ):
            row = {"image_size": size}
            for extra in (row, np.array(row, object), json.dumps(row, default=rewards._plain)):
                got = compute_score("stvqa", completion, gold, extra)
                assert got["score"] == pytest.approx(expected, abs=CIOU_EPS)
            (got,) = compute_score_batch([{"response": completion, "ground_truth": gold} | row])
            assert got["overall"] == pytest.approx(expected, abs=CIOU_EPS)


@pytest.mark.parametrize("nothing", [None, math.nan, np.float64("nan"), "", " \n"])
def test_rows_without_gold(nothing):
    """None is TRL's word for a row that is another function's; elsewhere there is no such word."""
    logged = {}
    golds, more = [GOLD, nothing, GOLD], {"image_size": [SIZE, None, SIZE], "log_metric": logged.__setitem__}
    got = trl_spatial_reward([GOOD, GOOD, "no"], golds, **more)
    assert got == [pytest.approx(1, abs=CIOU_EPS), None, 0.0]
    assert logged["spatial_reward/format"] == 0.5
    assert trl_spatial_reward([GOOD], [nothing]) == [None]
    with pytest.raises(ValueError, match="stvqa, row 7: ground truth"):
        compute_score("stvqa", GOOD, nothing, {"image_size": SIZE, "index": 7})
    row = {"response": GOOD, "ground_truth": GOLD, "image_size": SIZE}
    with pytest.raises(ValueError, match="row 1: ground truth"):
        compute_score_batch([row, row | {"ground_truth": nothing}])


@pytest.mark.parametrize("gold, size, message", [
    (GOLD, None, "image_size"), (GOLD, "wide", "image_size.*'wide'"), (GOLD, "200x", "image_size"),
    (GOLD, (0, 0), "image_size"), (GOLD, "0x0", "image_size"), (GOLD, 7, "image_size"), (GOLD, {}, "None"),
    ("(B) left", SIZE, "ground truth.*<scene>"), (7, SIZE, "ground truth"), ("{", SIZE, "JSON"),
    ({"scene": SCENE}, SIZE, "ground truth.*answer"), ({"answer": "(B) left"}, SIZE, "ground truth.*objects"),
    ("[" * 9999, SIZE, "ground truth"), ('{"a":' * 9999, SIZE, "ground truth|nested"),
])  # fmt: skip
def test_adapters_name_the_row(gold, size, message):
    rows = [{"response": GOOD, "ground_truth": g, "image_size": s} for g, s in [(GOLD, SIZE), (gold, size)]]
    golds, sizes = [GOLD, gold], [SIZE, size]
    for call, where in (
        (lambda: trl_spatial_reward([GOOD] * 2, golds, image_size=sizes), "row 1: "),
        (lambda: compute_score_batch(rows), "row 1: "),
        (lambda: compute_score("stvqa", GOOD, gold, {"image_size": size, "index": 1}), "stvqa, row 1: "),
    ):
        with pytest.raises(ValueError, match=f"{where}.*{message}") as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    with pytest.raises(ValueError, match="row 0: .*missing.*response"):
        compute_score_batch([{"ground_truth": GOLD}])
    for extra in ("[1]", 7, "", None, []):
        with pytest.raises(ValueError, match="stvqa, row without an index: expected image_size"):
            compute_score("stvqa", GOOD, GOLD, extra)


def test_trl_logs_the_terms():
    logged = {}
    trl_spatial_reward(completions=TEXTS, answer_option_text=[GOLD] * 3, image_size=[SIZE] * 3,
                       log_metric=logged.__setitem__)  # fmt: skip
    assert logged["spatial_reward/format"] == pytest.approx(2 / 3, abs=ROUNDING)
    assert logged["spatial_reward/accuracy"] == pytest.approx(1 / 3, abs=ROUNDING)


@pytest.mark.filterwarnings("ignore")
def test_trl_calls_it():
    """Through the method of TRL's GRPOTrainer that calls reward functions; the rest of it is faked."""
    from trl import GRPOTrainer

    logged = {}
    trainer = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=[trl_spatial_reward],
        reward_processing_classes=[None], reward_func_names=["trl_spatial_reward"],
        state=types.SimpleNamespace(global_step=0), environments=None,
        args=types.SimpleNamespace(report_to=[]), _log_completion_extra=print, _log_metric=logged.__setitem__,
    )  # fmt: skip
    prompts = [[{"role": "user", "content": STATED}]] * 3
    inputs = [{"prompt": p, "answer_option_text": GOLD, "category": "relation"} for p in prompts]
    got = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, [chat(t) for t in TEXTS], [[1]] * 3)
    assert got.flatten().tolist() == pytest.approx(EXPECTED, abs=CIOU_EPS + 2.0**-24)  # float32 there
    assert logged["spatial_reward/format"] == pytest.approx(2 / 3, abs=ROUNDING)


@pytest.mark.parametrize(
    "extra, prefix",
    [
        ({"image_size": SIZE}, ""), ({"image_size": np.array(SIZE)}, ""), ({"problem": STATED}, ""),
        ({"question": STATED}, ""), (None, "Image size: (200 x 100)\n"), ({}, "Image size: (200 x 100)"),
    ],
)  # fmt: skip
def test_verl(extra, prefix):
    """verl's naive manager passes keywords and takes a dict with `score`. The other keys are metrics beside a
    `reward` of its own, which they must not repeat."""
    for text, expected in zip(TEXTS, EXPECTED, strict=True):
        got = compute_score(
            data_source="stvqa", solution_str=text, ground_truth=prefix + GOLD, extra_info=extra,
            reward_router_address=None, reward_model_tokenizer=None,
        )  # fmt: skip
        assert got["score"] == pytest.approx(expected, abs=CIOU_EPS)
        assert set(got) == {"score", "format", "count", "accuracy", "spatial"}


def test_verl_needs_an_image_size():
    with pytest.raises(ValueError, match="image_size"):
        compute_score("stvqa", GOOD, GOLD)


def test_easyr1():
    """EasyR1's batch manager: a list of dicts in, a list of dicts with `overall` out."""
    gold = "Image size: (200 x 100)\n" + GOLD
    got = compute_score_batch([{"response": t, "response_length": 9, "ground_truth": gold} for t in TEXTS])
    assert [g["overall"] for g in got] == pytest.approx(EXPECTED, abs=CIOU_EPS)
    assert all(set(g) == {"overall", "format", "count", "accuracy", "spatial"} for g in got)
    (got,) = compute_score_batch([{"response": GOOD, "ground_truth": GOLD, "image_size": SIZE}])
    assert got["overall"] == pytest.approx(1, abs=CIOU_EPS)
    with pytest.raises(ValueError, match="image_size"):
        compute_score_batch([{"response": GOOD, "response_length": 9, "ground_truth": GOLD}])


def test_loads_by_path_as_verl_and_easyr1_do():
    spec = importlib.util.spec_from_file_location("custom_module", rewards.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # not in sys.modules
    assert module.spatial_reward(GOOD, GOLD, SIZE) == reward_of(GOOD)


# ---- the file ----------------------------------------------------------------------------------------------
def test_import_is_cheap_and_needs_only_numpy():
    code = (
        "import time; start = time.process_time(); import numpy; middle = time.process_time(); import sys; "
        "before = {*sys.modules}; import rewards; seconds = time.process_time() - middle; "
        "new = {name.partition('.')[0] for name in {*sys.modules} - before}; "
        "print(seconds < middle - start, *sorted(new - sys.stdlib_module_names))"
    )
    folder = Path(rewards.__file__).parent
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, check=True, text=True, timeout=300
    )
    assert out.stdout == "True rewards\n"  # nothing else, and no slower than numpy (a tenth of it)


def test_scoring_is_quick():
    """A loose bound for the suite; benchmarks/bench_rewards.py measures. 50 completions take 1.5
    yardsticks."""
    scene = graph([obj(f"{label}.{i}", (i, i, 90 + i, 50 + i)) for i, label in enumerate(LABELS[:4] * 2)])
    text, gold = reply(scene).replace(">t<", ">" + "t" * 1000 + "<"), gold_text(scene)
    spent = cpu_time(lambda: [score_completion(text, gold, SIZE) for _ in range(50)], 4)
    yard = cpu_time(yardstick, 5)
    assert spent < 8 * yard, f"{spent / yard:.1f} yardsticks"


# ---- box frame ----
@pytest.mark.parametrize("box, size, want", [
    ((0, 0, 1000, 1000), (640, 300), (0, 0, 640, 300)),  # the borders, exactly: nothing to clip
    ((0, 0, 1000, 1000), (333, 7), (0, 0, 333, 7)),
    ((500, 500, 501, 999), (640, 300), (320, 150, 320.64, 299.7)),  # each axis by its own side, unrounded
    ((-10, 20, 1010, 40.5), (100, 1000), (-1, 20, 101, 40.5)),  # over the edge: clipped later, as pixels are
])  # fmt: skip
def test_per_mille_becomes_pixels(box, size, want):
    scene = graph([obj("cup.1", box)], [])
    got = in_pixels(scene, "per_mille", size)["objects"][0]["bbox"]
    assert got == pytest.approx(want, rel=2**-52, abs=0)
    assert scene["objects"][0]["bbox"] == list(box)  # not written into
    assert in_pixels(scene, "pixel", size) is scene
    with pytest.raises(ValueError, match="box_frame: expected one of .*, got 'permille'"):
        in_pixels(scene, "permille", size)


def test_a_reply_in_per_mille_earns_what_the_same_boxes_earn_in_pixels():
    """SIZE is 200 x 100: five thousandths are a pixel across, ten are one down."""
    scaled = [
        obj(o["id"], [x * s for x, s in zip(o["bbox"], (5, 10, 5, 10), strict=True)]) for o in (MOVED, CAT)
    ]
    pixels, per_mille = (reply(graph(objects, SCENE["relationships"])) for objects in ([MOVED, CAT], scaled))
    want = score_completion(pixels, GOLD, SIZE)
    got = score_completion(per_mille, GOLD, SIZE, box_frame="per_mille")
    assert got.reward == pytest.approx(want.reward, abs=ROUNDING) and got.matches[0][2] < 0.7
    assert score_completion(per_mille, GOLD, SIZE).reason == "box_outside"  # read as pixels
    assert score_completion(pixels, GOLD, SIZE, box_frame="per_mille").spatial < 0.5


@pytest.mark.parametrize("box, reason", [
    ((0, 0, 1000, 1000), None),
    ((1000, 0, 1001, 10), "box_outside"),  # begins where the image ends
    ((999, 999, 1000, 1000), None),
    ((-5, -5, 0, 10), "box_outside"),
    ((0, 0, 1e308, 1e308), None),  # clipped
    ((1e308, 0, 1.1e308, 10), "box_outside"),
    ((0, 0, 5e-324, 1), "box_outside"),  # no width is left after the division
    ((5, 0, 5.000000000000001, 1), None),  # nor here, inside: IoU 0, no error
])  # fmt: skip
def test_boxes_at_the_borders_of_per_mille(box, reason):
    score = score_completion(reply(graph([obj("dog.1", box)])), GOLD, SIZE, box_frame="per_mille")
    assert score.reason == reason and 0 <= score.reward <= 1


@pytest.mark.parametrize("box, size, want", [
    ((0, 0, 640, 300), (640, 300), [0, 0, 1000, 1000]),
    ((1, 1, 2, 2), (3, 3), [333, 333, 667, 667]),
    ((0, 0, 1, 1), (4000, 4000), [0, 0, 1, 1]),  # a quarter of a thousandth: at least one
    ((3999, 3999, 4000, 4000), (4000, 4000), [999, 999, 1000, 1000]),  # also at the far border
])  # fmt: skip
def test_gold_boxes_to_imitate_are_whole_thousandths(box, size, want):
    gold = gold_text(graph([obj("cup.1", box)], []))
    text = in_per_mille(gold, size)
    assert parse_ground_truth(text) == (graph([obj("cup.1", want)], []), "(B) left")
    imitated = reply(graph([obj("cup.1", want)]))
    assert score_completion(imitated, gold, size, box_frame="per_mille").format == 1


# ---- options, outside the parity promise ----
WRONG = reply(SCENE, "(A) right")


@pytest.mark.parametrize("completion, options, spatial, reward", [
    (WRONG, {}, 0, 0.3),
    (WRONG, {"gate": False}, 1, 0.5),
    (reply(graph([DOG, CAT]), "(A) right"), {"gate": False}, 1, 0.1 + 0.2 * 0.7 + 0.2),
    (WRONG, {"judge": lambda text: text == WRONG}, 1, 1.0),
    (GOOD, {"judge": lambda text: False}, 0, 0.3),
    ("(B) left", {"gate": False, "judge": lambda text: True}, 0, 0.0),  # malformed is malformed
])  # fmt: skip
def test_gate_and_judge(completion, options, spatial, reward):
    got = score_completion(completion, GOLD, SIZE, **options)
    assert (got.spatial, got.reward) == pytest.approx((spatial, reward), abs=CIOU_EPS)


@pytest.mark.parametrize("box, credit, spatial", [
    # IoU 0.6, CIoU 0.6 - 1/61: the moved dog of test_spatial_by_hand
    (MOVED["bbox"], "ciou", (1 + 0.6 - 1 / 61) / 2),
    (MOVED["bbox"], "positive_ciou", 0.6 - 1 / 61),
    (MOVED["bbox"], "iou50", 0.6),
    ((60, 20, 140, 80), "iou50", 0),  # IoU 1/3
    ((20, 20, 64, 80), "iou50", 0.55),  # of the dog, 44 of 80 wide
    ((150, 20, 190, 80), "positive_ciou", 0),  # apart
    ((150, 20, 190, 80), "iou50", 0),
])  # fmt: skip
def test_credit_of_boxes(box, credit, spatial):
    scene = graph([obj("dog.1", box)])
    got = score_completion(reply(scene), gold_text(graph([DOG])), SIZE, box_credit=credit)
    assert got.spatial == pytest.approx(spatial, abs=CIOU_EPS)


def test_a_blind_box_takes_nothing_from_an_exact_one():
    scene = graph([DOG, obj("cat.1", (0, 0, 10, 10))])
    got = score_completion(reply(scene), gold_text(graph([DOG, CAT])), SIZE, box_credit="positive_ciou")
    assert got.spatial == pytest.approx(0.5, abs=CIOU_EPS) and got.matches[1][3] < 0


def test_unknown_credit_is_refused():
    with pytest.raises(ValueError, match="box_credit: expected one of .*'iou50'.*, got 'giou'"):
        score_completion(GOOD, GOLD, SIZE, box_credit="giou")


@pytest.mark.parametrize("label, spatial", [("dog", 1), ("small_dogs", 1), ("xyz", 0.5)])
def test_a_pair_of_unrelated_labels_may_earn_nothing(label, spatial):
    scene = graph([obj(f"{label}.1", DOG["bbox"]), CAT])
    assert reward_of(reply(scene))["spatial"] == pytest.approx(1, abs=CIOU_EPS)
    got = score_completion(reply(scene), GOLD, SIZE, need_label=True)
    assert got.spatial == pytest.approx(spatial, abs=CIOU_EPS) and len(got.matches) == 2


BIRD = obj("bird.1", (0, 0, 20, 20))
BY, AT = rel("dog.1", "by", "cat.1"), rel("dog.1", "at", "cat.1")
ON, NEAR_BY = rel("dog.1", "on", "cat.1"), rel("bird.1", "next to", "dog.1")


@pytest.mark.parametrize("said, gold, share", [
    ([ON, NEAR_BY], [ON, NEAR_BY], 1),
    ([ON], [ON, NEAR_BY], 0.5),
    ([rel("dog.1", " ON ", "cat.1"), rel("bird.1", "Next_To", "dog.1")], [ON, NEAR_BY], 1),
    ([rel("dog.1", "under", "cat.1")], [ON, NEAR_BY], 0),
    ([rel("cat.1", "on", "dog.1")], [ON, NEAR_BY], 0),  # the other way round
    ([ON, rel("dog.1", "under", "cat.1")], [ON], 0.5),  # one of two guesses about a pair
    ([ON, BY], [ON, BY], 1),
    ([ON, BY, AT], [ON, BY], 2 / 3),
    ([ON, rel("cat.1", "under", "dog.1")], [ON], 1),  # of a pair that gold does not relate: costs count only
    ([ON, rel("cat.1", "on", "dog.1")], [ON], 0.5),  # both ways round: one of two guesses
    ([ON, BY, rel("cat.1", "on", "dog.1")], [ON, BY], 2 / 3),
    ([ON, rel("cat.1", "on", "dog.1")], [ON, rel("cat.1", "ON", "dog.1")], 1),  # as gold has it
    ([ON], [ON, rel("dog.1", "On", "cat.1")], 1),  # gold says one thing twice
    ([ON], [ON, rel("dog.1", "on", "dog.1"), rel("dog.1", "on", "gone.1")], 1),  # what no reply can say
    ([], [], 1),
    ([ON], [], 0),
])  # fmt: skip
def test_relation_term_by_hand(said, gold, share):
    objects = [DOG, CAT, BIRD]
    weights = Weights(accuracy=0.3, relation=0.2)
    completion, text = reply(graph(objects, said)), gold_text(graph(objects, gold))
    score = score_completion(completion, text, SIZE, weights=weights)
    assert score.relation == pytest.approx(share)
    plain = score_completion(completion, text, SIZE)
    assert score.reward == pytest.approx(plain.reward - 0.2 + 0.2 * share, abs=PARITY)
    wrong = score_completion(completion.replace("(B)", "(A)"), text, SIZE, weights=weights)
    assert wrong.relation == 0


def test_relations_are_found_by_matching_not_by_number():
    gold = graph([obj("dog.1", (0, 0, 20, 20)), obj("dog.2", (150, 50, 190, 90)), CAT],
                 [rel("dog.2", "behind", "cat.1")])  # fmt: skip
    swapped = graph([obj("dog.2", (0, 0, 20, 20)), obj("dog.1", (150, 50, 190, 90)), CAT])
    for subject, share in ("dog.1", 1), ("dog.2", 0):
        said = swapped | {"relationships": [rel(subject, "behind", "cat.1")]}
        assert score_completion(reply(said), gold_text(gold), SIZE).relation == share
    # at the right place under a name that has nothing to do with it
    other = graph([obj("xyz.1", DOG["bbox"]), CAT], [rel("xyz.1", "left of", "cat.1")])
    assert score_completion(reply(other), GOLD, SIZE).relation == 0
