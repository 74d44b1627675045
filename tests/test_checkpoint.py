"""Checkpoints: what is kept, continued and refused. Shards: test_sharding.py; kills: end to end."""

import json

import pytest
import torch
from bounds import U64, rounding
from programs import metrics, run_script, settings

from checkpoint import (
    CheckpointError,
    checkpoints,
    fingerprint,
    refuse_another_run,
    resume,
    rotate,
    row_sums,
    save,
)
from train_grpo import FREE_TO_CHANGE, GRPOConfig


class Parts:
    """Just enough of a model and its processor to be saved: a linear layer and empty configs."""

    def __init__(self):
        from accelerate import Accelerator
        from transformers import GenerationConfig, PretrainedConfig

        torch.manual_seed(0)
        self.accelerator, self.model = Accelerator(cpu=True), torch.nn.Linear(3, 2)
        self.model.config = self.processor = PretrainedConfig()
        self.model.generation_config = GenerationConfig()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self):
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, out, step, **kwargs):
        save(
            self.accelerator,
            self.model,
            self.optimizer,
            self.processor,
            out,
            step,
            **({"scores": {}, "keep_last": 9} | kwargs),
        )

    def resume(self, out, how="auto"):
        return resume(self.accelerator, self.model, self.optimizer, out, how)


def names(out):
    return [p.name for p in checkpoints(out)]


def test_continued_exactly(tmp_path):
    a, b = Parts(), Parts()
    a.step()
    a.save(tmp_path, 1)
    a.step()
    torch.nn.init.zeros_(b.model.weight)
    assert b.resume(tmp_path) == 1
    b.step()
    assert torch.equal(a.model.weight, b.model.weight) and torch.equal(a.model.bias, b.model.bias)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    parts = Parts()
    for step, score in enumerate((0.1, 0.9, 0.3, None, 0.2), start=1):
        scores = {} if score is None else {"val_reward": score}
        parts.save(tmp_path, step, scores=scores, keep_last=2, best="val_reward")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == ["checkpoint-5"]


def test_half_a_checkpoint_is_not_one(tmp_path):
    parts = Parts()
    parts.save(tmp_path, 3)
    for left in ("checkpoint-4.tmp", "checkpoint-2.old"):
        (tmp_path / left).mkdir()
    assert names(tmp_path) == ["checkpoint-3"] and parts.resume(tmp_path) == 3
    parts.save(tmp_path, 3)  # once more
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_metrics_of_lost_steps_are_cut_off(tmp_path):
    parts, metrics = Parts(), tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i}) + "\n" for i in range(6)]
    parts.save(tmp_path, 3)
    metrics.write_text("".join(lines) + '{"step": 6, "re')
    assert parts.resume(tmp_path) == 3
    assert metrics.read_text() == "".join(lines[:4])
    assert parts.resume(tmp_path, "never") == 0 and metrics.read_text() == ""


def test_damage_is_named(tmp_path):
    parts = Parts()
    parts.save(tmp_path, 1)
    checkpoint = tmp_path / "checkpoint-1"
    (file,) = (checkpoint / "model").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="checkpoint-1/model: expected this model's state"):
        parts.resume(tmp_path)
    (checkpoint / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="trainer.json: expected a checkpoint's record"):
        parts.resume(tmp_path)
    with pytest.raises(CheckpointError, match="resume=elsewhere: expected auto, never or a checkpoint"):
        parts.resume(tmp_path / "new", "elsewhere")


def test_fingerprint_by_hand():
    # rows 4 and 5: sum 1 - 2 + 3 + 4 = 6, magnitudes 3 and 7, 4 * 3 + 5 * 7 = 47
    assert row_sums(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), first=4).tolist() == [6, 10, 47]
    assert row_sums(torch.zeros(0, 5)).tolist() == [0, 0, 0]  # a process may hold no row of a small parameter
    parts = Parts()
    sums = fingerprint(parts.accelerator, parts.model)
    assert sums.keys() == {"weight", "bias"}
    total = parts.model.bias.double().sum().item()
    assert sums["bias"][0] == pytest.approx(total, abs=rounding(2, u=U64))
    swapped = Parts()
    with torch.no_grad():
        swapped.model.weight.copy_(swapped.model.weight.flip(0))
    assert fingerprint(parts.accelerator, swapped.model)["weight"] != sums["weight"]


def test_another_config_is_refused_by_its_keys(tmp_path):
    cfg = GRPOConfig(out=str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"config": cfg.model_dump(mode="json")}))
    changed = GRPOConfig(out="elsewhere", learning_rate=2e-6, clip_low=0.1, save_every=7)
    refuse_another_run(changed, tmp_path, FREE_TO_CHANGE)  # nothing to continue yet
    Parts().save(tmp_path, 1)
    refuse_another_run(GRPOConfig(out="elsewhere", save_every=7), tmp_path, FREE_TO_CHANGE)
    with pytest.raises(CheckpointError, match="another config") as error:
        refuse_another_run(changed, tmp_path, FREE_TO_CHANGE)
    assert str(error.value).splitlines()[1:] == [
        "  learning_rate: 1e-06 there, 2e-06 here",
        "  clip_low: 0.2 there, 0.1 here",
    ]
    with pytest.raises(CheckpointError, match="holds a run already"):
        refuse_another_run(GRPOConfig(resume="never"), tmp_path, FREE_TO_CHANGE)
    with pytest.raises(CheckpointError, match="holds a run already"):  # somebody else's
        refuse_another_run(GRPOConfig(resume="elsewhere/checkpoint-1"), tmp_path, FREE_TO_CHANGE)
    assert FREE_TO_CHANGE <= set(GRPOConfig.model_fields)


def test_a_run_from_elsewhere_continues_itself(tmp_path):
    """resume=PATH starts from PATH once; the same command again goes on from its own last checkpoint."""
    parts, start, out = Parts(), tmp_path / "start", tmp_path / "out"
    parts.save(start, 2)
    path = str(start / "checkpoint-2")
    refuse_another_run(GRPOConfig(resume=path), out, FREE_TO_CHANGE)
    assert parts.resume(out, path) == 2
    parts.save(out, 3)
    (out / "run.json").write_text(json.dumps({"config": GRPOConfig(resume=path).model_dump(mode="json")}))
    refuse_another_run(GRPOConfig(resume=path), out, FREE_TO_CHANGE)
    assert parts.resume(out, path) == 3


@pytest.mark.slow
def test_a_continued_run_needs_no_more_memory_than_a_fresh_one(tiny_base, tiny_data, tmp_path):
    """Peaks of real processes, of a model whose weights, gradients and moments are nearly all they hold."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(tiny_base)
    wide = dict(hidden_size=960, num_attention_heads=30, intermediate_size=8192)  # 100M parameters
    for name, value in wide.items():
        setattr(config.text_config, name, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    weights_gb = sum(p.numel() for p in model.parameters()) * 4 / 2**30
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(tiny_base).save_pretrained(tmp_path / "model")
    del model

    def peak_gb(out, **overrides):
        small = dict(model=tmp_path / "model", data=tiny_data, out=out, sampler="hf", val_every=0)
        small |= dict(prompts_per_step=2, group_size=2, updates_per_step=1, max_completion_length=8)
        small |= dict(tracker="none", samples_every=0, save_every=9)
        run_script("train_grpo.py", "configs/tiny.yaml", *settings(**small | overrides))
        return metrics(out, timings=True)[-1]["mem_gb"]  # before the last checkpoint is written

    fresh = peak_gb(tmp_path / "fresh", steps=1)
    continued = peak_gb(tmp_path / "continued", steps=2, resume=tmp_path / "fresh" / "checkpoint-1")
    # Both hold weights, gradients and two moments in an update, the continued one already when it loads:
    # zero gradients make the moments, and are gone when files are read, one tensor (6 % of the weights) at a
    # time. There is room for no copy of the moments: beside what is loaded it would be 5 x weights_gb.
    assert weights_gb > 0.35 and fresh > 4 * weights_gb
    assert continued - fresh < weights_gb / 2
