"""The real loop in real processes: vLLM samples, weights reach it, kill -9 and Ctrl-C lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
TIMINGS = ("gen_s", "logp_s", "update_s", "sync_s", "gen_tokens_per_s", "update_tokens_per_s", "mem_gb")


def command(out, data, **overrides):
    small = {"data": data, "out": out, "steps": 4, "val_every": 2, "val_limit": 8, "prompts_per_step": 4,
             "group_size": 4, "updates_per_step": 2, "kl_coef": 0.01, "learning_rate": 3e-4, "save_every": 1,
             "samples_every": 2} | overrides
    return [sys.executable, "train_grpo.py", "configs/tiny.yaml", *(f"{k}={v}" for k, v in small.items())]


def train(out, data, **overrides):
    done = subprocess.run(command(out, data, **overrides), cwd=REPO, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics(out, timings=False):
    path = Path(out) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lines if timings else [{k: v for k, v in m.items() if k not in TIMINGS} for m in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, train(out, tiny_data)


def test_the_run_leaves_what_the_readme_says(undisturbed):
    out, printed = undisturbed
    lines = metrics(out, timings=True)
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4]
    assert {"val_reward", "val_accuracy", "val_mean_iou", "val_format"} <= set(lines[0]) & set(lines[4])
    assert "step 4/4 | reward" in printed
    assert (out / "config.yaml").exists() and (out / "run.json").exists()
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]  # keep_last=2
    assert len((out / "samples" / "step-00002" / "completions.jsonl").read_text().splitlines()) == 16
    assert list((out / "samples" / "step-00002").glob("*.png"))
    assert list((out / "grpo").glob("events*"))  # TensorBoard


def test_metrics_are_consistent(undisturbed):
    for m in metrics(undisturbed[0])[1:]:
        assert m["reward"] == pytest.approx(
            0.1 * m["format"] + 0.2 * m["count"] + 0.5 * m["accuracy"] + 0.2 * m["spatial"], abs=1e-9)
        assert m["grad_norm"] > 0 and m["entropy"] > 0 and m["skipped"] == 0
        assert sum(m["rejected"].values()) == round((1 - m["format"]) * 16)


def test_the_sampler_holds_the_policy_after_every_sync(undisturbed):
    """float32, vision tower training: log-probs agree to 1e-4 after six updates, and the weights moved."""
    import torch
    from safetensors.torch import load_file

    out, _ = undisturbed
    assert max(m["mismatch_max"] for m in metrics(out)[1:]) <= 1e-4
    start = load_file(REPO / "assets" / "tiny" / "model.safetensors")
    end = {k.replace("model.visual", "visual").replace("model.language_model", "model"): v  # the hub's names
           for k, v in load_file(out / "checkpoint-4" / "model.safetensors").items()}
    moved = [k for k in start if not torch.equal(start[k].float(), end[k].float())]
    assert any("visual" in k for k in moved) and any("layers.3" in k for k in moved)


@pytest.mark.parametrize("when", ["rollout", "save"])
def test_a_killed_run_continues_as_if_nothing_had_happened(when, undisturbed, tiny_data, tmp_path):
    """kill -9 after the second step: while its checkpoint is written, or in the middle of the next one."""
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out, tiny_data), cwd=REPO, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    ready = (lambda: len(metrics(out)) > 2) if when == "save" else (lambda: (out / "checkpoint-2").exists())
    while not ready():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(metrics(out)) < 5
    train(out, tiny_data)
    assert metrics(out) == metrics(undisturbed[0])


def test_ctrl_c_saves_says_how_to_go_on_and_exits_0(undisturbed, tiny_data, tmp_path):
    out = tmp_path / "stopped"
    process = subprocess.Popen(command(out, tiny_data, save_every=100), cwd=REPO, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    while len(metrics(out)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    assert "continue with: " in printed and "train_grpo.py configs/tiny.yaml" in printed
    done = metrics(out)[-1]["step"]
    assert (out / f"checkpoint-{done}").exists() and done < 4
    train(out, tiny_data, save_every=100)
    assert metrics(out) == metrics(undisturbed[0])


def test_the_hf_sampler_runs_the_same_loop(tiny_data, tmp_path):
    train(tmp_path / "hf", tiny_data, sampler="hf", steps=2, max_completion_length=96, val_limit=2,
          tracker="none")
    lines = metrics(tmp_path / "hf")[1:]
    assert len(lines) == 2 and max(m["mismatch_max"] for m in lines) <= 1e-4
    assert lines[-1]["grad_norm"] > 0


# ---- messages ----
def run(*arguments, **env):
    return subprocess.run([sys.executable, "train_grpo.py", *arguments], cwd=REPO, capture_output=True,
                          text=True, timeout=120, env=os.environ | env)


def test_a_typo_is_named_with_the_nearest_key():
    done = run("configs/tiny.yaml", "learnig_rate=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "learnig_rate" in done.stderr and "did you mean 'learning_rate'" in done.stderr


def test_dry_run_says_what_is_missing_without_network_or_gpu():
    done = run("configs/7b.yaml", "dry_run=true", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "512 prompts x 8 = 4096 sequences a step, 4 updates of 1024, 75 steps" in done.stdout
    assert "missing: data: OX-PIXL/STVQA-7K" in done.stdout
    assert "missing: model: Qwen/Qwen2.5-VL-7B-Instruct" in done.stdout
    assert "missing: GPU" in done.stdout and "memory per process at 8.29B parameters" in done.stdout


def test_dry_run_of_the_tiny_config_finds_everything(tiny_data, tmp_path):
    done = run("configs/tiny.yaml", f"data={tiny_data}", "dry_run=true", f"out={tmp_path / 'x'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is missing" in done.stdout and not (tmp_path / "x").exists()
