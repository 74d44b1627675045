"""Every family through the programs: both trainers, a continued run, the merger, evaluation; and vLLM."""

import json
import re

import pytest
import torch
from programs import metrics, run_script

import evaluate
import train_grpo
import train_sft
from merge import merge
from packing import FAMILIES
from results import read_records

pytestmark = pytest.mark.slow


def settings(model, data, out):
    known = {"model": str(model), "data": str(data), "out": str(out), "template": "spatial_thinker"}
    return known | dict(min_pixels=1024, max_pixels=16384, val_limit=2, box_frame="per_mille")


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.mark.parametrize("model_type, tied", [("qwen2_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_tuned_trained_continued_merged_and_evaluated(model_type, tied, family, tiny_data, tmp_path, quiet):
    tuned, run = tmp_path / "sft", tmp_path / "grpo"
    train_sft.train(train_sft.SFTConfig(
        **settings(family(model_type, tied), tiny_data, tuned), target="scene_answer", lora_rank=2,
        epochs=0.1, batch_size=2, log_every=1,
    ))  # fmt: skip
    assert len(metrics(tuned)) == 2 and metrics(tuned)[-1]["val_loss"] > 0
    small = dict(
        prompts_per_step=2, group_size=2, updates_per_step=1, max_completion_length=6, sampler="hf",
        tracker="none", save_every=1, val_every=0, learning_rate=1e-3, samples_every=0,
    )  # fmt: skip
    for out, steps in ((run, 1), (run, 2), (tmp_path / "whole", 2)):  # stopped after one step and continued
        cfg = train_grpo.GRPOConfig(**settings(tuned / "final", tiny_data, out), **small, steps=steps)
        train_grpo.train(cfg)
    assert metrics(run) == metrics(tmp_path / "whole") and len(metrics(run)) == 2
    merged = merge(run, dtype="float32")
    assert f"{FAMILIES[model_type].name} weights" in (merged / "README.md").read_text()
    evaluate.main([
        *("--dataset", str(tiny_data / "val.parquet"), "--model_path", str(merged), "--provider", "hf"),
        *("--limit", "3", "--max_new_tokens", "5", "--min_pixels", "1024", "--max_pixels", "16384"),
        *("--box_frame", "per_mille", "--out", str(tmp_path), "--custom_filename", "x"),
    ])  # fmt: skip
    _, records = read_records(tmp_path / "x.jsonl")
    assert len(records) == 3 and not any(r["finish_reason"] == "failed" for r in records)


@pytest.mark.parametrize("model_type, tied", [("qwen2_vl", True), ("qwen3_vl", False)])
def test_vllm_agrees_after_an_update_of_everything(model_type, tied, family, tiny_data, tmp_path):
    """Log-probs of the engine, from its own kernels, and of one packed row, before and after a sync."""
    done = run_script("tests/synced.py", family(model_type, tied), tiny_data, tmp_path)
    got = json.loads(re.findall(r"^{.*}$", done.stdout, re.M)[-1])
    assert got["still"] == [] and got["unknown"] == []  # all weights moved; all in the engine are ours
    assert got["moved"] > 0.1  # nats: an engine with the old weights, or old image features, would show
    assert got["before"] < 1e-4 and got["after"] < 1e-4
    assert torch.isfinite(torch.tensor(list(map(got.get, ("before", "moved", "after"))))).all()
