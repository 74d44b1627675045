"""results.py: grades, figures, official scores, comparisons and files, by hand."""

import json
import math
from dataclasses import replace

import fixtures
import numpy as np
import pytest
from fixtures import records_of, write_results
from scipy.stats import binomtest

from data import Sample, load_samples
from evaluate import main
from results import (
    Grade,
    Record,
    check_same_run,
    collapse,
    compare,
    details,
    grade,
    grid,
    jaccard,
    judge,
    locked,
    mean,
    open_results,
    overview,
    read_records,
    regrade,
    run_name,
    summarise,
    summarise_run,
    tally,
    wilson,
    write_tables,
)
from rewards import Weights
from testsets import DATASETS, summarise_results

SIDES = ("left of", "right of", "above", "below")


# ---- every kind of answer ----
def item(kind, answer, options=(), **meta):
    return Sample("1", (), (100, 100), "?", tuple(options), answer, answer, kind=kind, meta=meta)


def test_every_kind_of_answer_is_graded():
    square = "[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8)]"
    for sample, right, wrong in (
        (item("choice", "(B) right of", SIDES), "B", "A"),
        (item("yes_no", "Yes"), "yes", "no"),
        (item("number", "3.0"), "three", "4"),
        (item("word", "Red"), "It is red.", "blue"),
        (item("sequence", "BDAC"), "B, D, A, C", "ABCD"),
        (item("point", square, frame="unit"), "(0.5, 0.5)", "(0.1, 0.5)"),
    ):
        assert grade(sample, right)["correct"] and not grade(sample, wrong)["correct"]
        assert grade(sample, wrong)["parsed"] is not None
        unread = grade(sample, "<think>no end")
        assert (unread["correct"], unread["parsed"]) == (False, None)
        failed = grade(sample, right, finish_reason="failed")
        assert (failed["correct"], failed["method"]) == (False, "failed")


def test_a_reply_cut_off_counts_only_where_it_has_answered():
    sample = item("choice", "(B) right of", SIDES)
    for reply, read in (
        ("<answer>B</answer> and", "B"),
        ("B. right of\nBecause", "B"),
        ("B. Because", None),
        ("\\boxed{B} so", "B"),
        ("Is the answer B", None),
        ("it is right of", None),
    ):
        assert grade(sample, reply, finish_reason="length")["parsed"] == read


# ---- grading ----
@pytest.fixture(scope="module")
def sample(tiny_data):
    """Two gold objects; one relationship; the answer is (B) right."""
    drawn = load_samples(str(tiny_data / "val.parquet"), "val")[0]
    objects = [{"id": "cup.1", "bbox": [0, 0, 20, 20]}, {"id": "plate.1", "bbox": [40, 40, 80, 80]}]
    relationships = [{"subject": "cup.1", "predicate": "on", "object": "plate.1"}]
    scene = {"objects": objects, "relationships": relationships}
    gold = f"<scene>{json.dumps(scene)}</scene>\n<answer>(B) right</answer>"
    return replace(drawn, size=(100, 100), options=("left", "right"), answer="(B) right", ground_truth=gold)


def reply_of(boxes, answer="(B) right"):
    objects = [{"id": label, "bbox": box} for label, box in boxes.items()]
    scene = json.dumps({"objects": objects, "relationships": []})
    return f"<observe>o</observe><scene>{scene}</scene><think>t</think><answer>{answer}</answer>"


def test_grade_by_hand(sample):
    # The cup is exact (IoU 1), the plate shifted by half its width: 20 * 40 / (2 * 1600 - 800) = 1/3.
    got = grade(sample, reply_of({"cup.1": [0, 0, 20, 20], "plate.1": [60, 40, 100, 80]}))
    assert (got["parsed"], got["method"], got["correct"], got["reason"]) == ("B", "answer_tag", True, None)
    assert got["terms"]["format"] == 1 and got["terms"]["accuracy"] == 1
    assert got["terms"]["count"] == 0.7  # no relationship predicted
    assert [m[:2] for m in got["matches"]] == [[0, 0], [1, 1]]
    # EPS = 1e-7 in the denominators takes 1e-7 / 0.04 off the cup, whose union is 0.2 x 0.2 of the image, and
    # less off the plate: half of 2.5e-6 in the mean.
    assert got["mean_iou"] == pytest.approx((1 + 1 / 3) / 2, abs=2e-6)
    # CIoU of the plate: 1/3 less centre distance^2 20^2 over hull diagonal^2 60^2 + 40^2; equal aspects
    assert got["mean_ciou"] == pytest.approx((1 + 1 / 3 - 400 / 5200) / 2, abs=2e-6)
    assert (got["recall50"], got["gold_objects"]) == (0.5, 2)
    assert grade(sample, reply_of({"cup.1": [0, 0, 20, 20]}))["recall50"] == 0.5  # of the gold objects


def test_grade_of_a_rejected_reply(sample):
    got = grade(sample, "(B) right")
    assert got["correct"] and got["terms"] == dict.fromkeys(got["terms"], 0.0)
    assert (got["reason"], got["matches"], got["mean_iou"], got["recall50"]) == ("missing_tag", [], None, 0.0)


def test_grade_without_a_scene(sample):
    got = grade(replace(sample, ground_truth="(B) right"), "A")
    assert got == {"parsed": "A", "method": "letter", "correct": False, "released": False}


def test_overlap_of_scenes_by_hand(sample):
    # gold triplets {(cup, on, plate)}, labels {cup, plate}; predicted {(cup, on, plate), (cup, near, lamp)}
    objects = [{"id": f"{name}.1", "bbox": [0, 0, 9, 9]} for name in ("cup", "plate", "lamp")]
    pairs = [("cup.1", "on", "plate.1"), ("cup.1", "near", "lamp.1")]
    relationships = [dict(zip(("subject", "predicate", "object"), p, strict=True)) for p in pairs]
    scene = json.dumps({"objects": objects, "relationships": relationships})
    got = grade(sample, f"<observe>o</observe><scene>{scene}</scene><think>t</think><answer>B</answer>")
    assert (got["object_jaccard"], got["triplet_jaccard"]) == (2 / 3, 1 / 2)
    none = grade(sample, "B")
    assert (none["object_jaccard"], none["triplet_jaccard"]) == (0, 0)
    figures = summarise([got, none, none | {"correct": False}])
    assert (figures["right_scene"]["n"], figures["right_scene"]["accuracy"]) == (1, 1.0)
    assert (figures["wrong_scene"]["n"], figures["wrong_scene"]["accuracy"]) == (2, 0.5)


def test_jaccard_mean_and_tally_by_hand():
    a, b, none = frozenset("ab"), frozenset("bc"), frozenset()
    assert (jaccard(a, b), jaccard(a, a), jaccard(a, none), jaccard(none, none)) == (1 / 3, 1.0, 0.0, 1.0)
    assert (mean([1.0, 0.0, 0.5]), mean([]), mean([1.0, None])) == (0.5, None, None)
    assert tally([{"correct": True}, {"correct": False}] * 2) == {
        "n": 4,
        "correct": 2,
        "accuracy": 0.5,
        "ci95": list(wilson(2, 4)),
    }
    assert tally([]) == {"n": 0, "correct": 0, "accuracy": 0.0, "ci95": [0.0, 1.0]}


def test_instances_of_one_label_are_one_label(sample):
    """Jaccard is of labels and triplets of labels, not of the ids that number them."""
    objects = [{"id": f"{name}", "bbox": [0, 0, 9, 9]} for name in ("cup.1", "cup.2", "plate.7", "Plate.8")]
    relationships = [{"subject": "cup.2", "predicate": "On", "object": "plate.7"}]
    scene = json.dumps({"objects": objects, "relationships": relationships})
    got = grade(sample, f"<observe>o</observe><scene>{scene}</scene><think>t</think><answer>B</answer>")
    assert (got["object_jaccard"], got["triplet_jaccard"]) == (1.0, 1.0)


def test_a_grade_stands_when_given_again(sample):
    for reply, reason in (
        (reply_of({"cup.1": [0, 0, 20, 20]}), "stop"),
        ("right", "length"),
        ("x", "failed"),
    ):
        record = {
            "kind": "choice",
            "choices": ["left", "right"],
            "gold": "(B) right",
            "ground_truth": sample.ground_truth,
            "size": [100, 100],
            "meta": {},
            "reply": reply,
            "finish_reason": reason,
        }
        graded = grade(sample, reply, finish_reason=reason)
        assert regrade(record | {"correct": None, "method": "luck"}) == record | graded
        assert judge(sample, reply, reason).items() <= graded.items()


def test_the_weights_given_are_those_that_count(sample):
    reply = reply_of({"cup.1": [0, 0, 20, 20]})  # count 0.7 * (1 - 1/2)
    assert grade(sample, reply, Weights(0.0, 1.0, 0.0, 0.0))["terms"]["reward"] == 0.35
    assert grade(sample, reply, Weights(0.0, 0.0, 1.0, 0.0))["terms"]["reward"] == 1.0


def test_wilson_equals_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (8, 10), (10, 10), (357, 692)):
        interval = binomtest(k, n).proportion_ci(0.95, "wilson")
        # a dozen operations in doubles (2e-16 each) on numbers of about 1
        assert wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-14)
    assert wilson(0, 0) == (0, 1)


def test_summary_by_hand(sample):
    exact = {"cup.1": [0, 0, 20, 20], "plate.1": [40, 40, 80, 80]}
    replies = [
        ("x", reply_of(exact), "stop"),
        ("x", reply_of({"cup.1": [0, 0, 20, 20]}, "(A) left"), "stop"),
        ("y", "(B) right", "stop"),
        ("y", reply_of(exact)[:-26], "length"),
        ("y", "", "failed"),
    ]
    records = [{"category": c, "finish_reason": why, **grade(sample, reply)} for c, reply, why in replies]
    got = summarise(records)
    assert (got["n"], got["correct"], got["accuracy"]) == (5, 2, 0.4)
    assert (got["unparsed"], got["truncated"], got["failed"]) == (2, 1, 1)
    assert got["ci95"] == list(wilson(2, 5))
    assert {c: (t["n"], t["correct"]) for c, t in got["categories"].items()} == {"x": (2, 1), "y": (3, 1)}
    assert (got["scenes"], got["format"], got["exact"]) == (5, 0.4, 0.2)
    # count: 0.7 for the first; 0.7 * (1 - 1/2) for the second
    assert got["count"] == pytest.approx((0.7 + 0.35) / 5, abs=1e-15)  # a sum of five doubles below 1
    # the spatial term of the first: EPS takes up to 2.5e-6 / 2 off it, weighed by 0.2 / 5
    assert got["reward"] == pytest.approx((0.1 + 0.2 * 0.7 + 0.5 + 0.2 + 0.1 + 0.2 * 0.35) / 5, abs=1e-7)
    # three pairs, all exact but for EPS: 2.5e-6 of a cup, 6e-7 of a plate
    assert got["mean_iou"] == pytest.approx(1 - (2.5e-6 + 2.5e-6 + 6.25e-7) / 3, abs=1e-9)
    assert got["recall50"] == 3 / 10  # of all gold objects, those of rejected replies too
    assert got["rejected"] == {"missing_tag": 3} and "reasons" not in got
    assert got["methods"] == {"answer_tag": 2, "letter": 1, "none": 1, "empty": 1}
    floats = [value for value in got.values() if isinstance(value, float)]
    assert all(map(math.isfinite, floats))


def test_pairs_count_alike_and_half_is_enough():
    """Means over pairs, not over items; IoU and Jaccard of exactly one half are in."""

    def scene(correct, pairs, gold_objects, jaccards):
        terms = {"reward": 0.5, "format": 1.0, "count": 0.25, "accuracy": float(correct), "spatial": 0.75}
        return {
            "correct": correct,
            "parsed": "A",
            "method": "letter",
            "released": not correct,
            "terms": terms,
            "reason": None,
            "matches": [[0, 0, iou, ciou] for iou, ciou in pairs],
            "gold_objects": gold_objects,
            "object_jaccard": jaccards[0],
            "triplet_jaccard": jaccards[1],
        }

    records = [
        scene(True, [(0.5, 0.25), (0.25, 0.0)], 3, (1.0, 0.5)),
        scene(False, [(1.0, 1.0)], 1, (0.5, 0.0)),
    ]
    got = summarise([*records, {"correct": True, "parsed": 3.0, "method": "text"}])
    assert (got["mean_iou"], got["mean_ciou"]) == ((0.5 + 0.25 + 1) / 3, (0.25 + 0 + 1) / 3)
    assert got["recall50"] == 2 / 4
    assert (got["object_jaccard"], got["triplet_jaccard"]) == (0.75, 0.25)
    assert (got["right_scene"]["n"], got["right_scene"]["correct"]) == (1, 1)
    assert (got["wrong_scene"]["n"], got["wrong_scene"]["correct"]) == (1, 0)
    terms = [got[name] for name in ("reward", "format", "count", "exact", "spatial")]
    assert terms == [0.5, 1.0, 0.25, 0.5, 0.75]
    assert (got["n"], got["scenes"], got["accuracy"], got["released"]) == (3, 2, 2 / 3, 0.5)


def test_summary_of_nothing_matched(sample):
    got = summarise([grade(sample, "B")])
    assert (got["mean_iou"], got["recall50"], got["accuracy"]) == (0.0, 0.0, 1.0)
    assert "scenes" not in summarise([grade(replace(sample, ground_truth="(B) right"), "B")])


# ---- official scores ----
def official(name, records):
    return DATASETS[name].official(records)


def test_cv_bench_averages_sources(folder):
    # right: 0 (ADE20K), 2 (COCO), 5 (COCO); wrong: 1 (ADE20K), 3 and 4 (Omni3D)
    records = records_of("cv-bench", folder, lambda i, s: i in (0, 2, 5))
    assert official("cv-bench", records) == {"mean of 2D and 3D": 0.375, "2D": 0.75, "3D": 0.0}
    two_d = records_of("cv-bench-2D", folder, lambda i, s: i in (0, 2, 3))
    assert official("cv-bench-2D", two_d) == {"2D": 0.75}


def record(correct, **keys):
    return {"correct": bool(correct), "meta": {}} | keys


def test_sources_count_alike_whatever_their_size():
    """Three right of four in ADE20K, none of one in COCO, one of two in Omni3D."""
    counts = {"ADE20K": [1, 1, 1, 0], "COCO": [0], "Omni3D": [1, 0]}
    records = [record(c, meta={"source": source}) for source, right in counts.items() for c in right]
    assert official("cv-bench", records) == {
        "mean of 2D and 3D": (0.375 + 0.5) / 2,
        "2D": (0.75 + 0.0) / 2,
        "3D": 0.5,
    }
    assert official("cv-bench", records[:4]) == {"mean of 2D and 3D": None, "2D": None, "3D": None}


def test_counting_errors_are_relative_and_at_most_1():
    said = [(4, 3.0), (2, 9.0), (0, 1.0), (0, 0.0), (5, None)]  # errors 1/4, 1, 1, 0, 1
    records = [
        record(0, category="counting", kind="number", gold=str(float(gold)), parsed=parsed)
        for gold, parsed in said
    ]
    assert official("spatialbench", records)["counting, 1 - error"] == 1 - 3.25 / 5


def test_an_image_may_have_several_pairs():
    """Five of six right: two of three pairs, whichever images they are about."""
    rights = [("a", 1), ("a", 1), ("a", 0), ("a", 1), ("b", 1), ("b", 1)]
    records = [record(right, category="reach", cluster=image) for image, right in rights]
    assert official("spatialbench", records) == {"mean": 2 / 3, "reach pairs": 2 / 3}


def test_mmvp_pairs(folder):
    records = records_of("mmvp", folder, lambda i, s: i in (0, 1, 2, 5))
    assert official("mmvp", records) == {"pairs": 1 / 3}


def test_spatialbench_pairs_and_counting(folder):
    # existence: first pair right, second half right; reach: all; size: none; positional: one of two;
    # counting: gold 2 read as 3 (error 1/2), gold 4 unread (error 1)
    right = {0, 1, 2, *range(4, 8), 12}
    records = records_of("spatialbench", folder, lambda i, s: i in right)
    records[14]["parsed"] = 3.0
    got = official("spatialbench", records)
    assert got == {
        "mean": (0.5 + 1 + 0 + 0.5 + 0.25) / 5,
        "existence pairs": 0.5,
        "reach pairs": 1.0,
        "size pairs": 0.0,
        "positional": 0.5,
        "counting, 1 - error": 0.25,
    }


def test_three_d_sr_circular_and_flip(tmp_path):
    fixtures.write_3dsrbench_upstream(tmp_path / "3dsrbench.tsv")
    # AAAA: all four right; BBBB: both rotations right, of its mirror image one
    records = records_of("3dsrbench", tmp_path / "3dsrbench.tsv", lambda i, s: i != 7)
    assert official("3dsrbench", records) == {"circular and flip": 0.5, "circular": 0.75}


def test_three_d_sr_without_ids_has_no_official_score(folder):
    assert official("3dsrbench", records_of("3dsrbench", folder, lambda i, s: True)) == {}


def test_hallusionbench_groups(folder):
    # rows in order: figure 0, question 0: VD VS; question 1: VD VS; figure 1 likewise. Wrong: row 3 (VS,
    # figure 0, question 1), row 4 (VD, figure 1, question 0).
    records = records_of("hallusionbench", folder, lambda i, s: i not in (3, 4))
    got = official("hallusionbench", records)
    assert got["aAcc"] == 6 / 8
    assert got["qAcc"] == 2 / 4  # VD 0 is spoiled by row 4, VS 1 by row 3
    assert got["fAcc"] == 2 / 3  # VD 0 and VS 1 are whole, VD 1 is not; VS 0 shows no figure
    assert got["mean of aAcc, qAcc, fAcc"] == pytest.approx((6 / 8 + 2 / 4 + 2 / 3) / 3)
    # both questions of VS without a figure: two questions are spoiled, no figure is
    records = records_of("hallusionbench", folder, lambda i, s: i not in (1, 3))
    assert official("hallusionbench", records) == {
        "mean of aAcc, qAcc, fAcc": (6 / 8 + 2 / 4 + 1) / 3,
        "aAcc": 6 / 8,
        "qAcc": 2 / 4,
        "fAcc": 1.0,
    }


def test_mmstar_means_over_l2_categories(folder):
    records = records_of("mmstar", folder, lambda i, s: i in (0, 1))
    assert official("mmstar", records) == {"mean over l2 categories": (1 + 1 / 3) / 2}


def test_robospatial_kinds(tmp_path):
    fixtures.write(tmp_path / "robospatial.parquet", *fixtures.robospatial_home())
    records = records_of("robospatial", tmp_path, lambda i, s: s.kind == "point")
    assert official("robospatial", records) == {"yes/no": 0.0, "points": 1.0}


def test_a_run_is_summed_up_by_hand():
    """Tokens, price, letters and what is missing, of four items asked and three that answered."""
    config = {"dataset": "mine", "model_path": "a/m", "template": "t", "provider": "p", "price": [2.0, 10.0]}
    header = {"config": config, "data": {"n": 5, "rows": 5}}
    records = [
        record(c, kind="choice", gold=f"({gold}) x", parsed=parsed, method="letter", released=True)
        | {"finish_reason": "stop", "prompt_tokens": 100, "n_tokens": 7, "meta": {"level": "easy"}}
        for c, gold, parsed in ((1, "B", "B"), (0, "B", "A"), (0, "A", None))
    ]
    records.append(record(1, kind="number", gold="3.0", parsed=3.0, method="text", meta={"level": "hard"}))
    got = summarise_run(header, records, replace(DATASETS["stvqa"], rows=5, released=False))
    assert (got["prompt_tokens"], got["tokens"]) == (300, 21)
    assert got["usd"] == (2 * 300 + 10 * 21) / 1e6
    assert (got["missing"], got["n"], got["correct"]) == (1, 4, 2)
    assert got["letters"] == {"said": {"A": 1, "B": 1, "None": 1}, "gold": {"A": 1, "B": 2}}
    assert {name: t["n"] for name, t in got["tables"]["level"].items()} == {"easy": 3, "hard": 1}
    assert "released" not in got and "each_rotation" not in got  # the paper's evaluator reads it otherwise
    assert summarise_run(header, records)["released"] == 1.0
    assert summarise_run(header, records)["tables"] == {}
    scored = replace(DATASETS["robospatial"], official=lambda records: {"always": 1.0})
    for left_out, official_scores in (({}, {"always": 1.0}), ({"skipped": 1}, {}), ({"n": 5}, {})):
        data = {"n": 4, "rows": 4} | left_out  # a row left out, a reply missing
        assert summarise_run(header | {"data": data}, records, scored)["official"] == official_scores
    whole = summarise_run(header | {"data": {"n": 4, "rows": 4}}, records, DATASETS["robospatial"], paper=0.5)
    assert whole["paper"] is None  # 4 rows are not the benchmark's 228
    numbers = [record(1, kind="point", parsed=(0, 0), method="text", gold="") for _ in range(228)]
    header = {"config": config, "data": {"n": 228, "rows": 228}}
    whole = summarise_run(header, numbers, DATASETS["robospatial"], paper=0.5)
    assert whole["paper"] == 0.5 and whole["official"] == {"points": 1.0} and "letters" not in whole


def rotation(row, turn, **keys):
    return {"id": f"{row}@{turn}", "row": row, "turns": 2, "correct": True, "parsed": "A", "terms": {}} | (
        {"finish_reason": "stop", "released": True, "kind": "choice"} | keys
    )


@pytest.mark.parametrize(
    "spoiled, item",
    [
        ({}, {"correct": True, "parsed": "A", "finish_reason": "stop", "released": True}),
        ({"correct": False}, {"correct": False, "parsed": "A", "finish_reason": "stop", "released": True}),
        ({"parsed": None}, {"correct": True, "parsed": None, "finish_reason": "stop", "released": True}),
        ({"released": False}, {"correct": True, "parsed": "A", "finish_reason": "stop", "released": False}),
        ({"finish_reason": "length"}, {"correct": True, "parsed": "A", "finish_reason": "length"}),
        ({"finish_reason": "failed"}, {"correct": True, "parsed": "A", "finish_reason": "failed"}),
    ],
)
def test_an_item_is_what_the_worst_of_its_rotations_is(spoiled, item):
    whole = [rotation(1, 0), rotation(1, 1)]
    for records in ([rotation(0, 0) | spoiled, rotation(0, 1)], [rotation(0, 0), rotation(0, 1) | spoiled]):
        got, other = collapse([*records, *whole])
        assert item.items() <= got.items() and got["row"] == 0 and "terms" not in got
        assert other["correct"] and other["finish_reason"] == "stop"
    assert [r["row"] for r in collapse([rotation(0, 0) | spoiled, *whole])] == [
        1
    ]  # its other turn is missing


def test_official_scores_need_all_items(folder):
    records = records_of("mmvp", folder, lambda i, s: True)
    config = {"dataset": "mmvp", "model_path": "x", "template": "t", "provider": "hf"}
    header = {"config": config, "data": {"n": 6}}
    assert summarise_results(header, records)["official"] == {"pairs": 1.0}
    assert summarise_results(header, records[:4])["official"] == {}
    header["data"] |= {"rows": 300}  # as many as the benchmark has
    header["config"] |= {"model_path": "OX-PIXL/SpatialThinker-7B"}
    assert summarise_results(header, records)["paper"] == 0.78
    header["config"]["blind"] = True
    assert summarise_results(header, records)["paper"] is None
    assert summarise_results(header, records)["variant"] == "blind"
    header["config"]["limit"] = 6
    assert summarise_results(header, records)["official"] == {}


# ---- comparisons ----
def test_comparison_of_independent_items_is_mcnemars(tmp_path):
    a = [1] * 200 + [0] * 200
    b = [1] * 180 + [0] * 20 + [1] * 80 + [0] * 120
    got = compare(write_results(tmp_path / "a", a), write_results(tmp_path / "b", b))
    assert (got["n"], got["clusters"], got["a"], got["b"]) == (400, 400, 0.5, 0.65)
    assert (got["only_a"], got["only_b"], got["test"]) == (20, 80, "McNemar, exact")
    assert got["p"] == binomtest(20, 100).pvalue
    # the normal approximation of a paired difference: 0.15 +- 1.96 * sqrt((100 - 60^2/400) / 400^2)
    half = 1.96 * np.sqrt(100 - 60**2 / 400) / 400
    # draws have means on a grid of 0.0025; a 2.5 % quantile of 10,000 is known to 0.00065: a step and 4 such
    assert got["ci95"] == pytest.approx([0.15 - half, 0.15 + half], abs=0.0051)


def test_items_about_one_image_are_one_observation(tmp_path):
    gain = [i < 20 for i in range(30)]
    a = [0 if g else 1 for g in gain for _ in range(10)]
    b = [1 if g else 0 for g in gain for _ in range(10)]  # ten equal items an image
    clusters = [i // 10 for i in range(300)]
    alone = compare(write_results(tmp_path / "a", a), write_results(tmp_path / "b", b))
    together = compare(write_results(tmp_path / "a", a, clusters), write_results(tmp_path / "b", b, clusters))
    assert together["clusters"] == 30 and together["test"] == "sign flips of clusters"
    # as if an image were one item; a share of 0.1 among 10,000 flips is known to 0.003
    assert together["p"] == pytest.approx(binomtest(20, 30).pvalue, abs=0.01)
    assert alone["p"] < 1e-6
    width = [got["ci95"][1] - got["ci95"][0] for got in (alone, together)]
    # both ends of the wider one, 0.67, lie on a grid of 2 / 30: half a step each is 10 %
    assert width[1] == pytest.approx(width[0] * np.sqrt(10), rel=0.15)


def test_clusters_count_by_their_size_and_flip_on_both_sides(tmp_path):
    # images of one and of three items, all gained: every draw of images has a mean of exactly 1
    files = (
        write_results(tmp_path / "a", [0] * 4, [0, 1, 1, 1]),
        write_results(tmp_path / "b", [1] * 4, [0, 1, 1, 1]),
    )
    got = compare(*files)
    assert (got["difference"], got["ci95"], got["clusters"]) == (1.0, [1.0, 1.0], 2)
    # of the four ways to set the signs of 1 and 3 two are as far from 0; a share of 10,000 is known to 0.005
    assert got["p"] == pytest.approx(0.5, abs=0.02)
    assert compare(*files[::-1])["ci95"] == [-1.0, -1.0] and compare(*files[::-1])["only_a"] == 4
    # 40 images, all gained: no flip of 10,000 comes as far but the one observed
    clusters = [i // 2 for i in range(80)]
    files = (
        write_results(tmp_path / "a", [0] * 80, clusters),
        write_results(tmp_path / "b", [1] * 80, clusters),
    )
    assert compare(*files)["p"] == 1 / 10_001


def test_no_difference_has_p_1_and_other_items_are_refused(tmp_path):
    same = compare(write_results(tmp_path / "a", [1, 0, 1]), write_results(tmp_path / "b", [1, 0, 1]))
    assert (same["p"], same["difference"], same["ci95"]) == (1.0, 0.0, [0.0, 0.0])
    with pytest.raises(ValueError, match="expected the same items, got others in rows"):
        compare(tmp_path / "a", write_results(tmp_path / "b", [1, 0, 1], seed=1))


def test_failed_requests_are_not_compared(tmp_path):
    path = write_results(tmp_path / "a", [1, 0, 1, 0])
    path.write_text(path.read_text().replace('"finish_reason": "stop"', '"finish_reason": "failed"', 1))
    got = compare(path, write_results(tmp_path / "b", [0, 0, 1, 1]))
    assert (got["n"], got["only_a"], got["only_b"]) == (3, 0, 1)


# ---- tables ----
def test_tables_line_up():
    rows = [["name", "n"], ["a", "10"], ["longer", "7"]]
    assert grid(rows) == "name     n\na       10\nlonger   7"
    assert grid(rows, markdown=True).splitlines()[1] == "| --- | ---: |"


def test_overview_and_details_name_everything():
    header = {
        "config": {"dataset": "d", "model_path": "a/m", "template": "t", "provider": "p"},
        "data": {"n": 2},
    }
    records = [
        record(c, kind="yes_no", parsed="yes", method="text", category=name, finish_reason="stop")
        for c, name in ((1, "x"), (0, "y"))
    ]
    half = details(summarise_run(header, [records[0] | {"category": "\ud83d"}, records[1]]))
    assert half.splitlines()[2].split()[0] == "\\ud83d"  # what can be printed
    one = summarise_run(header, records)
    assert run_name(one) == "m, t"
    assert overview([one]).splitlines()[1].split() == ["d", "2", "50.0", "9.5", "-", "90.5", "0", "0", "0"]
    other = one | {"template": "u", "paper": 0.25, "official": {"pairs": 0.5}, "released": 0.125}
    lines = overview([one, other], released=True).splitlines()
    assert "model, template" in lines[0] and "m, u" in lines[2]
    assert lines[2].split()[-7:] == ["50.0", "(pairs)", "0", "0", "0", "25.0", "12.5"]
    assert "official: pairs 50.0" in details(other)
    assert [line.split() for line in details(one).splitlines()[:3]] == [
        ["category", "n", "accuracy", "95", "%", "interval"],
        ["x", "1", "100.0", "20.7", "-", "100.0"],  # Wilson at 1 of 1: 1 / (1 + z^2)
        ["y", "1", "0.0", "0.0", "-", "79.3"],
    ]


def test_rejections_are_told_under_their_old_name_too(sample, tmp_path):
    """Summaries of older versions call them reasons; their tables can still be written."""
    header = {
        "config": {"dataset": "d", "model_path": "m", "template": "t", "provider": "p"},
        "data": {"n": 1},
    }
    new = summarise_run(header, [grade(sample, "B") | {"kind": "choice", "gold": "(B) right"}])
    old = {"reasons" if key == "rejected" else key: value for key, value in new.items()}
    for name, summary in (("new", new), ("old", old)):
        assert "rejected: missing_tag 1" in details(summary)
        (tmp_path / f"{name}.summary.json").write_text(json.dumps(summary))
    write_tables(tmp_path)
    assert (tmp_path / "summary.md").read_text().count("rejected: missing_tag 1") == 2
    assert json.loads((tmp_path / "summary.json").read_text()) == [new, old]


# ---- files ----
def header_of(**config):
    return {"header": {"config": {"seed": 0} | config, "data": {"fingerprint": "x"}, "versions": {}}}


def line_of(i, reason="stop"):
    return json.dumps({"id": str(i), "row": i, "finish_reason": reason, "reply": "long"}) + "\n"


def test_a_run_goes_on_behind_its_last_whole_line(tmp_path, capsys):
    path = tmp_path / "new" / "r.jsonl"
    with open_results(path, header_of()) as (f, done):
        assert done == set()
        f.write((line_of(1) + line_of(0, "failed") + line_of(2)[:9]).encode())
    with open_results(path, header_of()) as (f, done):
        assert done == {"1"}  # what failed is asked again
        with pytest.raises(ValueError, match="another process is writing it"), locked(path, "rb"):
            pass
        f.write(line_of(0).encode())
    assert path.read_text() == json.dumps(header_of()) + "\n" + line_of(1) + line_of(0, "failed") + line_of(0)
    header, records = read_records(path)
    assert header == header_of()["header"] and [r["id"] for r in records] == ["0", "1"]
    assert [r["finish_reason"] for r in records] == ["stop", "stop"]  # the last of every item
    assert "reply" in records[0] and "reply" not in read_records(path, slim=True)[1][0]
    with pytest.raises(ValueError, match="another configuration .seed: 0 there, 1 here"):
        with open_results(path, header_of(seed=1)):
            pass
    now = header_of()["header"] | {"versions": {"torch": "9"}}
    check_same_run(path, header_of()["header"], now)
    assert "goes on with {'torch': '9'}" in capsys.readouterr().out


@pytest.mark.parametrize("half", ['{"he', '{"header": {"conf', json.dumps(header_of())])
def test_a_header_that_was_cut_off_costs_nothing(half, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text(half)
    with open_results(path, header_of()) as (f, done):
        f.write(line_of(1).encode())
    assert done == set() and "header was cut off" in capsys.readouterr().out
    assert path.read_text() == json.dumps(header_of()) + "\n" + line_of(1)


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "2", "row": 1, "finish_reason": "stop", "meta": []}',
        b"\0\0\0",
        b'{"id": "2"}',
        b"[1]",
        b"5",
        b"\xff",
        b'{"id": "2", "row": null, "finish_reason": 1}',
        b'{"id": 2, "row": 1, "finish_reason": "stop"}',
    ],
)
def test_a_line_that_is_no_record_costs_one_item(line, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    start = json.dumps(header_of()) + "\n" + line_of(1)
    path.write_bytes(start.encode() + line + b"\n" + line_of(3).encode())
    assert [r["id"] for r in read_records(path)[1]] == ["1", "3"]
    assert "passed over 1 lines that hold no record, the first is line 3" in capsys.readouterr().out
    with open_results(path, header_of()) as (_, done):
        assert done == {"1", "3"}


def test_foreign_files_in_the_folder_are_named(tmp_path, capsys):
    summary = summarise_run(header_of(dataset="d", model_path="m", template="t", provider="hf")["header"] | {
        "data": {"n": 0}}, [])  # fmt: skip
    (tmp_path / "good.summary.json").write_text(json.dumps(summary))
    (tmp_path / "dir.summary.json").mkdir()
    foreign = ["", "{", "[]", "7", "null", '{"a": 1}', json.dumps(summary | {"ci95": 3}), "[" * 100_000]
    for i, text in enumerate([*foreign, json.dumps(summary | {"categories": 5})]):
        (tmp_path / f"{i}.summary.json").write_text(text)
    (tmp_path / "bytes.summary.json").write_bytes(b"\xff\xfe")
    write_tables(tmp_path)
    assert capsys.readouterr().out.count("no summary of evaluate.py, left out of the table") == 11
    assert json.loads((tmp_path / "summary.json").read_text()) == [summary]


def test_records_of_another_program_are_named(tmp_path, capsys):
    path = write_results(tmp_path / "a.jsonl", [1, 0])  # without replies, kinds and methods
    for command in (["--rescore", str(path)], ["--report", str(path)]):
        with pytest.raises(SystemExit, match=f"error: {path}: expected records of evaluate.py, got others"):
            main(command)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "n, tokens", [("53", 53), ("53.0", 53), (53.0, 53), (None, 0), ("many", 0), ([5], 0)]
)
def test_what_a_server_gave_for_a_count_locks_no_file(n, tokens):
    config = {"dataset": "d", "model_path": "m", "template": "t", "provider": "p", "price": [1e6, 1e6]}
    answer = {"method": "x", "parsed": "A", "prompt_tokens": n, "n_tokens": n}
    got = summarise_run({"config": config, "data": {"n": 1}}, [record(1, kind="word", **answer)])
    assert (got["prompt_tokens"], got["tokens"], got["usd"]) == (tokens, tokens, 2 * tokens)


@pytest.mark.parametrize("key", ["correct", "cluster", "question_hash"])
def test_a_comparison_names_the_file_that_lacks_what_it_needs(key, tmp_path):
    good, bad = write_results(tmp_path / "good.jsonl", [1, 0]), write_results(tmp_path / "bad.jsonl", [0, 0])
    bad.write_text(bad.read_text().replace(key, "other"))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=f"^{bad}: expected records of evaluate.py, .*KeyError: '{key}'"):
            compare(*pair)


def test_a_comparison_with_nothing_but_failures_says_so(tmp_path):
    good, bad = write_results(tmp_path / "good.jsonl", [1, 0]), write_results(tmp_path / "bad.jsonl", [0, 0])
    bad.write_text(bad.read_text().replace('"stop"', '"failed"'))
    for a, b in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(ValueError, match=r"no item has an answer in .*bad.jsonl \(2 failed items\)"):
            compare(a, b)


def test_any_category_can_be_summed_up():
    records = [record(True, category=c, parsed="A", method="x") for c in (None, 3, "b", ["a"], {"k": 1}, "b")]
    got = summarise(records)["categories"]
    assert {name: t["n"] for name, t in got.items()} == {"": 1, "3": 1, "['a']": 1, "b": 2, "{'k': 1}": 1}


def test_what_a_record_holds_is_declared_once():
    """What may be absent of a Grade and of a Record, which holds one. Real ones are in test_evaluate.py."""
    assert Grade.__required_keys__ == {"parsed", "method", "correct"}
    assert Grade.__required_keys__ < Record.__required_keys__
    assert Record.__optional_keys__ - Grade.__optional_keys__ == {
        *("ground_truth", "error", "stop_reason", "note", "read_by", "read", "read_correct", "read_reply"),
        "box_frame",
    }
