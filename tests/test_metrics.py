"""What a step is measured by: every figure by hand; what the trackers are told."""

import io
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from bounds import U64, rounding
from PIL import Image

from config import Config, opt
from metrics import (
    HELD_OUT,
    UpdateStats,
    check_mismatch,
    lacking_tracker,
    log_samples,
    save_samples,
    start_tracker,
    step_line,
    step_metrics,
)
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


# ---- trackers ----
class Run(Config):
    out: str = opt(..., "folder")
    tracker: str = opt("tensorboard", "tracker")
    seed: int = opt(7, "any other key")


RED = Image.new("RGB", (6, 4), (255, 0, 0))


def saved_samples(folder):
    """Two prompts, of one image and of two, with two completions each."""
    score = types.SimpleNamespace(**vars(Score(0.5)), text="a term of this name")
    groups = [[Rollout(k, 7, [1], [-1.0], f"<scene>{k}{i}", True, score) for i in (0, 1)] for k in (0, 1)]
    data = [types.SimpleNamespace(id=f"row/{k}", question="Where?", ground_truth="(A) on") for k in (0, 1)]
    encoder = types.SimpleNamespace(images=lambda sample: [RED] * (1 + data.index(sample)))
    return save_samples(folder, groups, data, encoder)


def test_samples_are_saved_and_handed_on(tmp_path):
    saved = saved_samples(tmp_path / "step-1")
    assert {p.name for p in (tmp_path / "step-1").iterdir()} == {
        "completions.jsonl", "row_0_0.png", "row_1_0.png", "row_1_1.png",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "step-1" / "completions.jsonl").open()]
    assert [line["text"] for line in lines] == ["<scene>00", "<scene>01", "<scene>10", "<scene>11"]
    assert [len(images) for images, _ in saved] == [1, 2]
    assert [line | {"matches": []} for _, part in saved for line in part] == lines


def tensorboard_run(out, first, losses):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=out)
    start_tracker(accelerator, Run(out=str(out)), "grpo", first)
    for step, loss in losses.items():
        accelerator.log({"loss": loss}, step=step)
    log_samples(accelerator, "tensorboard", max(losses), saved_samples(out / "samples"))
    for tracker in accelerator.trackers:
        tracker.finish()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    # What its pages read with. All is tensors there: a text is its bytes, an image width, height and a PNG.
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
    from tensorboard.util.tensor_util import make_ndarray

    (tmp_path / "run").mkdir()
    tensorboard_run(tmp_path / "run", 0, {0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    tensorboard_run(tmp_path / "run", 2, {3: 3.5, 4: 4.5, 5: 5.5})  # from the checkpoint of step 2
    assert all(p.is_file() for p in (tmp_path / "run" / "grpo").iterdir())  # one run in its list, not several
    events = reader.EventAccumulator(str(tmp_path / "run" / "grpo"), {"tensors": 0}).Reload()

    def logged(tag):
        return [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]

    assert logged("loss") == [(0, 9.0), (1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    for tag in ("samples/0_0", "samples/1_0", "samples/1_1"):
        ((step, (width, height, png)),) = logged(tag)
        assert (step, width, height) == (5, b"6", b"4")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), np.asarray(RED))
    ((step, (text,)),) = logged("samples/1/text_summary")
    assert step == 5 and b"<scene>11" in text
    assert [(step, b"seed: 7" in text) for step, (text,) in logged("config/text_summary")] == [
        (0, True),
        (2, True),
    ]
    tensorboard_run(tmp_path / "run", 0, {0: 1.0, 1: 1.0})  # from the start: nothing of the old is left
    events.Reload()
    assert logged("loss") == [(0, 1.0), (1, 1.0)]


def test_wandb_keeps_project_name_and_id(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    accelerator = types.SimpleNamespace(
        is_main_process=True, wait_for_everyone=lambda: None,
        init_trackers=lambda project, init_kwargs: calls.append({"project": project} | init_kwargs["wandb"]),
    )  # fmt: skip

    def started(folder, first):
        Path(folder).mkdir(exist_ok=True)
        start_tracker(accelerator, Run(out=str(folder), tracker="wandb"), "grpo", first)
        return {key: calls[-1][key] for key in ("project", "name", "id")}

    one = started(tmp_path / "7b", 0)
    assert one["project"] == "grpo" and one["name"] == "7b" and len(one["id"]) == 8
    assert calls[-1]["resume"] == "allow" and calls[-1]["config"]["seed"] == 7
    assert started(tmp_path / "other", 0)["id"] != one["id"]
    for name, value in {"WANDB_PROJECT": "mine", "WANDB_NAME": "first", "WANDB_RUN_ID": "x1"}.items():
        monkeypatch.setenv(name, value)
    assert started(tmp_path / "7b", 5) == one
    assert started(tmp_path / "chosen", 0) == {"project": "mine", "name": "first", "id": "x1"}
    monkeypatch.delenv("WANDB_RUN_ID")
    assert started(tmp_path / "chosen", 3)["id"] == "x1"

    def refuse(*_, **__):
        raise RuntimeError("api_key not configured\ncall wandb.login()")

    accelerator.init_trackers = refuse
    with pytest.raises(SystemExit, match=r"^error: tracker=wandb: api_key not configured$"):
        started(tmp_path / "7b", 5)


def test_samples_are_a_table_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(Image=lambda image: ["image", image.size])
    )
    tables = []
    tracker = types.SimpleNamespace(log_table=lambda name, **table: tables.append((name, table)))
    accelerator = types.SimpleNamespace(get_tracker=lambda name: tracker)
    log_samples(accelerator, "wandb", 3, saved_samples(tmp_path / "s"))
    ((name, table),) = tables
    assert (name, table["step"]) == ("samples", 3)
    assert table["columns"][:6] == ["image_0", "image_1", "id", "question", "gold", "text"]
    assert [row[:3] for row in table["data"]][1:3] == [
        [["image", (6, 4)], None, "row/0"],
        [["image", (6, 4)], ["image", (6, 4)], "row/1"],
    ]
    assert [row[5] for row in table["data"]] == ["<scene>00", "<scene>01", "<scene>10", "<scene>11"]
    assert {len(row) for row in table["data"]} == {len(table["columns"])}
    log_samples(accelerator, "none", 3, [])
    assert len(tables) == 1


def test_wandb_itself(tmp_path, monkeypatch):
    """Offline, with its own package, where there is one."""
    wandb = pytest.importorskip("wandb")
    from accelerate import Accelerator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "run").mkdir()
    ids = []
    for first in (0, 2):
        accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=tmp_path)
        start_tracker(accelerator, Run(out=str(tmp_path / "run"), tracker="wandb"), "grpo", first)
        run = accelerator.get_tracker("wandb", unwrap=True)
        ids.append((run.project, run.name, run.id, run.config["seed"]))
        log_samples(accelerator, "wandb", first + 1, saved_samples(tmp_path / "samples"))
        accelerator.log({"loss": 1.0}, step=first + 1)
        (table,) = Path(run.dir).glob("media/table/*.json")
        rows = json.loads(table.read_text())["data"]  # a preview; the images travel with its artifact
        assert [row[:3] for row in rows[1:3]] == [["Image", None, "row/0"], ["Image", "Image", "row/1"]]
        wandb.finish()
    assert ids == [ids[0]] * 2 and ids[0][:2] == ("grpo", "run") and ids[0][3] == 7
    assert (tmp_path / "run" / "wandb").is_dir()
    sent = [p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert any(b.startswith(b"\x89PNG") for b in sent)


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_tracker_is_named_in_one_line(name, module, monkeypatch):
    want = f"tracker={name}: not installed (pip install {name}, or tracker=none)"
    monkeypatch.setitem(sys.modules, module, None)
    assert lacking_tracker(name) == want
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))  # as a folder ./wandb is
    assert lacking_tracker(name) == want
    assert lacking_tracker("none") is None


def test_a_missing_tracker_shows_in_a_dry_run_and_ends_the_start(tmp_path, monkeypatch, capsys):
    import dry_run
    import train_grpo
    import train_sft

    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, value in {"find_cards": None, "arithmetic": "", "plan": []}.items():
        monkeypatch.setattr(dry_run, name, lambda *_, value=value: value)
    settings = dict(data=str(tmp_path / "no.parquet"), out=str(tmp_path / "run"), tracker="wandb")
    assert dry_run.dry_run(train_grpo.GRPOConfig(**settings, sampler="hf")) == 1
    assert "missing: tracker=wandb: not installed" in capsys.readouterr().out
    for start, cfg in (
        (train_grpo.start, train_grpo.GRPOConfig(**settings)),
        (train_sft.train, train_sft.SFTConfig(**settings)),
    ):
        with pytest.raises(SystemExit, match="^error: tracker=wandb: not installed"):
            start(cfg)
    assert not (tmp_path / "run").exists()
