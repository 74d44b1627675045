"""The study's figures: what it keeps of a run, its intervals and tests, its table."""

import json
import re
import shlex

import numpy as np
import pytest
from programs import REPO

from benchmarks import study


def record(row, correct, matches, gold_objects=2):
    terms = {"reward": 0.5, "format": 1.0, "count": 1.0, "accuracy": 1.0, "spatial": 0.5}
    found = sum(iou >= 0.5 for *_, iou, _ in matches) / gold_objects
    return {"row": row, "correct": correct, "matches": matches, "gold_objects": gold_objects, "terms": terms,
            "recall50": found, "triplet_jaccard": 0.25}  # fmt: skip


def test_items_are_by_row_and_missing_objects_count_as_zero():
    got = study.items(
        [record(1, False, [[0, 1, 0.8, 0.7]]), record(0, True, [[0, 0, 0.9, 0.9], [1, 1, 0.6, 0]])]
    )
    assert got["correct"] == [1, 0] and got["iou"] == [0.75, 0.4] and got["worst_iou"] == [0.6, 0]
    assert got["recall50"] == [1, 0.5] and got["relations"] == [0.25, 0.25] and set(got) == set(study.TERMS)


def test_intervals_hold_rows_and_seeds():
    assert study.interval(np.ones((3, 50))) == pytest.approx((1, 1))
    # one seed: rows alone, a mean of n draws of variance p (1 - p)
    low, high = study.interval(np.repeat([[0.0, 1.0]], 500, axis=1).reshape(1, -1))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.1) and low < 0.5 < high
    # rows all alike: seeds alone. All three draws fall on the same seed once in nine
    low, high = study.interval(np.array([[0.0] * 9, [0.5] * 9, [1.0] * 9]))
    assert (low, high) == (0, 1)


def test_p_values():
    assert study.p_value(np.zeros(20)) == 1
    # five rows, all better: two of 2^5 flips are as far from nothing
    assert study.p_value(np.ones(5)) == pytest.approx(2 / 32, abs=4 * (0.06 / study.DRAWS) ** 0.5)
    assert study.p_value(np.array([1, -1] * 50)) == 1
    assert study.p_value(np.ones(100)) == 1 / (1 + study.DRAWS)


def result(arm, seed, correct, worst):
    n = len(correct)
    values = {"correct": correct, "worst_iou": worst} | {t: [0.5] * n for t in study.TERMS[1:6]}
    curve = [{"step": s, "val_accuracy": 0.1 * s, "val_mean_iou": 0.5} for s in (0, 1)]
    return {"arm": arm, "seed": seed, "identity": study.identity(arm), "curve": curve,
            "items": values | {"relations": [0] * n}}  # fmt: skip


def test_the_table_is_paired_and_the_picture_is_drawn(tmp_path):
    results = [
        result("dense", 0, [1, 1, 1, 0], [0.8, 0.8, 0.1, 0.1]),
        result("dense", 1, [1, 1, 1, 0], [0.8, 0.8, 0.1, 0.1]),
        result("sparse", 0, [1, 0, 0, 0], [0.1] * 4),
        result("start", 0, [0, 0, 0, 0], [0.1] * 4),
    ]
    for r in results:
        (tmp_path / f"{r['arm']}-{r['seed']}.json").write_text(json.dumps(r))
    found = study.load(study.StudyConfig(results=str(tmp_path)))
    assert [(arm, list(seeds)) for arm, seeds in found.items()] == [
        ("start", [0]), ("dense", [0, 1]), ("sparse", [0]),
    ]  # fmt: skip
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in study.table(found).splitlines()]
    assert lines[0] == [
        "",
        "accuracy",
        "reward",
        "IoU",
        "found",
        "count",
        "format",
        "right/wrong",
        "to dense",
        "p",
    ]
    start, dense, sparse = lines[2:]
    assert [row[0] for row in lines[2:]] == ["start", "dense", "sparse"]
    assert dense[1].startswith("75.0±") and dense[7:] == ["100/50", "", ""] and dense[2] == "50.0±0.0"
    assert sparse[7] == "-/25" and sparse[8].startswith("-50.0±") and start[8].startswith("-75.0±")
    assert study.against(found["sparse"], found["dense"]).tolist() == [[0, -1, -1, 0]]
    assert study.against({7: found["dense"][0]}, found["dense"]) is None
    study.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000


@pytest.mark.parametrize("spoil, message", [
    (lambda r: json.dumps(r | {"identity": "0"}), "dense-0.json was made with other settings"),
    (lambda r: json.dumps(r)[:-40], "dense-0.json is no whole result of this name; remove it"),
    (lambda r: "", "dense-0.json is no whole"),
    (lambda r: "[]", "dense-0.json is no whole"),
    (lambda r: json.dumps(r | {"seed": 1}), "dense-0.json is no whole"),
    (lambda r: json.dumps(r | {"arm": "sparse"}), "dense-0.json is no whole"),
    (lambda r: json.dumps({k: v for k, v in r.items() if k != "identity"}), "dense-0.json is no whole"),
    (lambda r: json.dumps(r | {"curve": [{}]}), "dense-0.json is no whole"),
    (lambda r: json.dumps(r | {"items": r["items"] | {"iou": [0.5]}}), "dense-0.json is no whole"),
    (lambda r: json.dumps(r | {"items": r["items"] | {"iou": [0.5, None]}}), "dense-0.json is no whole"),
    (lambda r: json.dumps(r | {"items": {t: v[:1] for t, v in r["items"].items()}}),
     "same held-out rows in all, got 1 \\(dense-0.json\\) and 2 \\(sparse-0.json\\)"),
])  # fmt: skip
def test_results_that_are_damaged_or_others_are_refused(tmp_path, spoil, message):
    (tmp_path / "dense-0.json").write_text(spoil(result("dense", 0, [1, 0], [1, 1])))
    (tmp_path / "sparse-0.json").write_text(json.dumps(result("sparse", 0, [1, 0], [1, 1])))
    with pytest.raises(SystemExit, match=message) as error:
        study.load(study.StudyConfig(results=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_an_arm_and_seed_named_twice_is_run_once(tmp_path, monkeypatch):
    done, start = [], result("start", 3, [1], [1])
    (tmp_path / "start-3.json").write_text(json.dumps(start))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").touch()
    monkeypatch.setattr(study, "do", lambda arm, seed, cfg: done.append((arm, seed)))
    words = f"arms=[sparse,dense,sparse] seeds=[1,1] jobs=1 out={tmp_path} results={tmp_path}".split()
    monkeypatch.setattr("sys.argv", ["study.py", *words])
    study.main()
    assert done == [("start", 0), ("sparse", 1), ("dense", 1)]
    assert "| start |" in (tmp_path / "study.md").read_text()


def test_the_commands_of_the_docstring_are_read():
    lines = [line for line in study.__doc__.splitlines() if line.startswith("    python ")]
    settings = [study.StudyConfig.load(shlex.split(line, comments=True)[2:]) for line in lines]
    assert [cfg.seeds for cfg in settings] == [[0, 1, 2], [0, 1, 2], [0], [0, 1, 2]]
    assert settings[2].arms == ["dense", "sparse"]


def test_the_readme_has_every_arm_and_seed_of_the_results_beside_it():
    found = study.load(study.StudyConfig(results=str(REPO / "assets/study")))
    assert {arm: sorted(seeds) for arm, seeds in found.items()} == {"start": [0]} | dict.fromkeys(
        study.ARMS, [0, 1, 2]
    )
    assert {len(r["items"]["correct"]) for seeds in found.values() for r in seeds.values()} == {1024}
    lines, pasted = study.table(found).splitlines(), (REPO / "README.md").read_text().splitlines()
    at = pasted.index(lines[0])
    for line, shown in zip(lines, pasted[at:], strict=False):
        numbers = [[float(x) for x in re.findall(r"[+-]?\d+\.\d+", text)] for text in (line, shown)]
        assert line.split()[1] == shown.split()[1] and len(numbers[0]) == len(numbers[1])
        assert np.allclose(*numbers, atol=0.25)  # another numpy may draw otherwise
