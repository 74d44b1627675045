"""What a step is measured by: every figure by hand."""

import math

import pytest
from bounds import U64, rounding

from metrics import HELD_OUT, UpdateStats, check_mismatch, step_line, step_metrics
from results import summarise
from rewards import Score
from train_grpo import Rollout

NEAR = {"rel": rounding(4, u=U64), "abs": 0}


def rollout(reward, tokens, advantage, finished=True, correct=False, **score):
    known = {"score": Score(reward, **score), "advantage": advantage, "correct": correct}
    return Rollout(0, 7, [1] * tokens, [-1.0] * tokens, "", finished, **known)


def test_means_of_completions_by_hand():
    matches = ((0, 0, 0.5, 0.4), (1, 1, 0.7, 0.6)), ((0, 0, 0.9, 0.9),)
    groups = [
        [
            rollout(1.0, 3, 0.7, format=1, count=1, accuracy=1, spatial=1, matches=matches[0], correct=True),
            rollout(0.2, 5, -0.7, format=1, count=0.5, matches=matches[1], finished=False),
        ],
        [
            rollout(0.0, 4, 0.0, reason="bad_json", correct=True),  # malformed, but its answer can be read
            rollout(0.0, 8, 0.0, reason="bad_json"),
        ],
    ]
    m = step_metrics(groups, [[UpdateStats(tokens=20)]])
    assert m["reward"] == pytest.approx(0.3, **NEAR)
    assert (m["format"], m["count"], m["exact"], m["spatial"], m["accuracy"]) == (0.5, 0.375, 0.25, 0.25, 0.5)
    # 1.0, 0.2, 0, 0: mean 0.3, squares 0.49 + 0.01 + 0.09 + 0.09 = 0.68, over 4
    assert m["reward_std"] == pytest.approx(math.sqrt(0.17), **NEAR)
    assert m["mean_iou"] == pytest.approx((0.5 + 0.7 + 0.9) / 3, **NEAR)  # a pair counts once
    assert (m["dead"], m["cut"], m["length"], m["rejected"]) == (0.5, 0.25, 5.0, {"bad_json": 2})
    plain = step_metrics(groups, [[UpdateStats(tokens=20)]], scenes=False)
    assert set(m) - set(plain) == {"count", "spatial", "mean_iou"}
    nothing = step_metrics([groups[1]], [[UpdateStats(tokens=12)]])
    assert nothing["mean_iou"] == 0 and nothing["dead"] == 1


def test_sums_of_updates_by_hand():
    """Two processes, three updates: means over all tokens; norms and skips of an update once."""
    nan = dict(grad_norm=math.nan, skipped=True)
    one = [UpdateStats(10, 30, loss=1.0, kl=2.0, mismatch=0.1, mismatch_max=0.05, grad_norm=3.0)]
    one += [UpdateStats(10, 30, entropy=4.0, clip_low=1, capped=2, **nan), UpdateStats(grad_norm=5.0)]
    two = [UpdateStats(30, 50, loss=5.0, clip_high=3, mismatch=0.3, mismatch_max=0.02, grad_norm=3.0)]
    two += [UpdateStats(10, 20, clip_dual=6, **nan), UpdateStats(grad_norm=5.0)]
    m = step_metrics([[rollout(0, 1, 0), rollout(0, 1, 0)]], [one, two])
    got = {k: m[k] for k in ("loss", "kl", "entropy", "clip_low", "clip_high", "clip_dual", "capped")}
    want = dict(loss=0.1, kl=2 / 60, entropy=4 / 60, clip_low=1 / 60, clip_high=3 / 60, clip_dual=0.1)
    assert got == pytest.approx(want | {"capped": 2 / 60}, **NEAR)
    assert (m["tokens"], m["trained"], m["mismatch_max"]) == (60, 130, 0.05)
    assert m["mismatch_mean"] == pytest.approx(0.4 / 60, **NEAR)
    assert (m["grad_norm"], m["skipped"]) == (4.0, 1)  # of 3, 5 and one that is not finite
    assert step_metrics([[rollout(0, 1, 0)]], [[UpdateStats(1, **nan)]])["grad_norm"] == 0


def test_sums_grow_by_declared_names_only():
    stats = UpdateStats()
    stats.add(tokens=2, loss=0.5, mismatch_max=0.3)
    stats.add(tokens=3, loss=-1.5, mismatch_max=0.1)
    assert stats == UpdateStats(tokens=5, loss=-1.0, mismatch_max=0.3)
    with pytest.raises(AttributeError, match="clip_hihg"):
        stats.add(clip_hihg=1, mismatch_max=0)


@pytest.mark.parametrize("mean, worst, on_gpu, ends", [
    (1e-7, 9e-3, False, False),
    (1e-7, 1.1e-2, False, True),  # one stale token is enough where float32 agrees to 1e-4
    (0.09, 30.0, True, False),  # bf16: the mean counts
    (0.11, 0.7, True, True),
])  # fmt: skip
def test_a_sampler_with_other_weights_ends_the_run(mean, worst, on_gpu, ends):
    m = {"step": 3, "mismatch_mean": mean, "mismatch_max": worst}
    if not ends:
        check_mismatch(m, on_gpu)
        return
    value = mean if on_gpu else worst
    with pytest.raises(RuntimeError, match=f"step 3: trainer and sampler differ by {value:.2g} nats"):
        check_mismatch(m, on_gpu)


def test_the_line_of_a_step():
    m = step_metrics([[rollout(0.5, 10, 0.1, format=1), rollout(0.1, 20, -0.1)]], [[UpdateStats(30)]])
    m |= {"step": 3, "gen_s": 1.0, "update_s": 2.0, "mem_gb": 4.0, "val_reward": 0.25, "val_accuracy": 0.5}
    line = step_line(m, steps=12, elapsed_s=3600.0, done=3)
    assert line.startswith(
        "step 3/12 | reward 0.300 | fmt 0.50 cnt 0.00 acc 0.00 spa 0.00 | dead 0% cut 0% | len 15"
    )
    assert line.endswith("4.0GB | eta 3.00h | held out: reward 0.250 accuracy 0.500")  # 9 steps at 20 minutes
    assert step_line({"step": 0, "val_accuracy": 0.5}, 12, 1.0, 0) == "step 0/12 | held out: accuracy 0.500"


def test_held_out_figures_are_those_of_a_summary():
    """One meaning, one name: what `val_` stands before is a key of evaluation's summary."""
    terms = dict.fromkeys(("reward", "format", "count", "accuracy", "spatial"), 1.0)
    record = {
        "parsed": "A",
        "method": "letter",
        "correct": True,
        "terms": terms,
        "reason": None,
        "matches": [],
    }
    record |= {
        "gold_objects": 0,
        "object_jaccard": 1.0,
        "triplet_jaccard": 1.0,
        "category": "",
        "finish_reason": "",
    }
    assert set(HELD_OUT) <= set(summarise([record]))
