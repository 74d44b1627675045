"""The real loop in real processes: vLLM samples, weights reach it, kill -9 and Ctrl-C lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parent.parent
TIMINGS = ("gen_s", "logp_s", "update_s", "sync_s", "gen_tokens_per_s", "update_tokens_per_s", "mem_gb")


def command(out, data, **overrides):
    small = {
        "data": data,
        "out": out,
        "steps": 4,
        "val_every": 2,
        "val_limit": 8,
        "prompts_per_step": 4,
        "group_size": 4,
        "updates_per_step": 2,
        "kl_coef": 0.01,
        "learning_rate": 3e-4,
        "save_every": 1,
        "samples_every": 2,
    } | overrides
    return [sys.executable, "train_grpo.py", "configs/tiny.yaml", *(f"{k}={v}" for k, v in small.items())]


def train(out, data, **overrides):
    done = subprocess.run(
        command(out, data, **overrides), cwd=REPO, capture_output=True, text=True, timeout=300
    )
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
    best = max((m for m in lines[1:] if "val_reward" in m), key=lambda m: m["val_reward"])["step"]
    kept = {p.name for p in out.glob("checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-4", f"checkpoint-{best}"}  # keep_last=2 and the best
    assert len((out / "samples" / "step-00002" / "completions.jsonl").read_text().splitlines()) == 16
    assert list((out / "samples" / "step-00002").glob("*.png"))
    assert list((out / "grpo").glob("events*"))  # TensorBoard


def test_metrics_are_consistent(undisturbed):
    for m in metrics(undisturbed[0])[1:]:
        assert m["reward"] == pytest.approx(
            0.1 * m["format"] + 0.2 * m["count"] + 0.5 * m["accuracy"] + 0.2 * m["spatial"], abs=1e-9
        )
        assert m["grad_norm"] > 0 and m["entropy"] > 0 and m["skipped"] == 0
        assert sum(m["rejected"].values()) == round((1 - m["format"]) * 16)


def test_the_sampler_holds_the_policy_after_every_sync(undisturbed, tmp_path):
    """float32, vision tower training: log-probs agree to 1e-4 after six updates, and the weights moved."""
    from safetensors.torch import load_file

    from merge import merge

    out, _ = undisturbed
    assert max(m["mismatch_max"] for m in metrics(out)[1:]) <= 1e-4
    start = load_file(REPO / "assets" / "tiny" / "model.safetensors")
    end = load_file(merge(out, tmp_path / "merged", "float32") / "model.safetensors")
    moved = [k for k in start if not torch.equal(start[k].float(), end[k].float())]
    assert any("visual" in k for k in moved) and any("layers.3" in k for k in moved)


def test_a_killed_run_continues_as_if_nothing_had_happened(undisturbed, tiny_data, tmp_path):
    """kill -9 from outside, in the middle of the third rollout of vLLM."""
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(out, tiny_data), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 240
    while not (out / "checkpoint-2").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(metrics(out)) < 5
    train(out, tiny_data)
    assert metrics(out) == metrics(undisturbed[0])


def interrupted(out, data, steps, number):
    """A run that got the signal once `steps` metrics lines stood: (exit status, what it printed)."""
    process = subprocess.Popen(
        command(out, data, save_every=100),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while len(metrics(out)) < steps:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=240)
    return process.returncode, printed


def test_ctrl_c_saves_says_how_to_go_on_and_exits_0(undisturbed, tiny_data, tmp_path):
    out = tmp_path / "stopped"
    status, printed = interrupted(out, tiny_data, 2, signal.SIGINT)
    assert status == 0 and "continue with: " in printed and "train_grpo.py configs/tiny.yaml" in printed
    done = metrics(out)[-1]["step"]
    assert (out / f"checkpoint-{done}").exists() and done < 4
    assert metrics(out) == metrics(undisturbed[0])[: done + 1]


def test_sigterm_saves_and_exits_with_its_own_status(undisturbed, tiny_data, tmp_path):
    out = tmp_path / "preempted"
    status, printed = interrupted(out, tiny_data, 3, signal.SIGTERM)
    assert status == 75 and "continue with: " in printed
    train(out, tiny_data, save_every=100)
    assert metrics(out) == metrics(undisturbed[0])


# ---- one and two processes, killed everywhere ----
HF = {
    "sampler": "hf",
    "steps": 3,
    "max_completion_length": 80,
    "val_every": 0,
    "tracker": "none",
    "samples_every": 0,
    "keep_last": 1,
}


def launch(script, processes, *arguments):
    """Run the script, by torchrun if there are several processes: (exit status, output)."""
    start = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
        ]
    )
    done = subprocess.run([*start, script, *arguments], cwd=REPO, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_every_phase_and_resumed(processes, tiny_data, tmp_path):
    """One run, killed in its rollout, between updates, after its log line, while and after it saves."""
    straight = command(tmp_path / "straight", tiny_data, **HF)[2:]
    status, output = launch("train_grpo.py", processes, *straight)
    assert status == 0, output
    killed = command(tmp_path / "killed", tiny_data, **HF)[2:]
    for moment, count in (("rollout", 1), ("update", 2), ("save", 1), ("log", 1), ("renamed", 2)):
        status, output = launch("tests/kill_at.py", processes, moment, str(count), *killed)
        assert status == -signal.SIGKILL, f"{moment}: {status} {output}"
    status, output = launch("train_grpo.py", processes, *killed)
    assert status == 0, output
    assert len(metrics(tmp_path / "killed")) == 3
    assert all(m["grad_norm"] > 0 for m in metrics(tmp_path / "killed"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    assert max(m["mismatch_max"] for m in metrics(tmp_path / "killed")) <= 1e-4
    assert sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-3"]


def test_sigterm_to_the_launcher_saves_what_two_processes_have(tiny_data, tmp_path):
    out = tmp_path / "preempted"
    frozen = HF | {"steps": 50, "save_every": 100, "freeze_vision": True}
    arguments = command(out, tiny_data, **frozen)[1:]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            *arguments,
        ],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"},
    )
    while not metrics(out):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert "continue with: accelerate launch train_grpo.py" in printed
    done = metrics(out)[-1]["step"]
    assert done < 50
    from safetensors.torch import load_file

    from merge import merge

    start = load_file(REPO / "assets" / "tiny" / "model.safetensors")
    end = load_file(merge(out / f"checkpoint-{done}", tmp_path / "merged") / "model.safetensors")
    moved = {k for k in start if not torch.equal(start[k], end[k])}
    assert moved and not any(k.startswith("visual") for k in moved)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes_with_vllm(tensor_parallel, undisturbed, tiny_data, tmp_path):
    """FSDP2 shards, an engine each or one for both: the sampler holds the policy after every sync."""
    out = tmp_path / "two"
    Path("/dev/shm/-tp:0-[0-1]-cpushm_0").write_bytes(b"left by a run that was killed")
    status, output = launch(
        "train_grpo.py",
        2,
        *command(out, tiny_data, steps=3, tensor_parallel=tensor_parallel, val_every=3, val_limit=24)[2:],
    )
    assert status == 0, output
    lines, alone = metrics(out), metrics(undisturbed[0])
    assert max(m["mismatch_max"] for m in lines[1:]) <= 1e-4
    for key in ("reward", "length", "entropy", "tokens"):  # the first step samples from the same weights
        assert lines[1][key] == pytest.approx(alone[1][key], rel=1e-3)
    assert lines[1]["grad_norm"] == pytest.approx(alone[1]["grad_norm"], rel=1e-2)
    # Sharded over two, merged in one: the folder answers as the trainer's engine did.
    from merge import merge

    merged, provider = merge(out, tmp_path / "merged", "float32"), ("hf", "vllm")[tensor_parallel - 1]
    subprocess.run(
        [
            sys.executable,
            "evaluate.py",
            "--dataset",
            tiny_data / "val.parquet",
            "--out",
            tmp_path,
            "--model_path",
            merged,
            "--provider",
            provider,
            "--min_pixels",
            "784",
            "--max_new_tokens",
            "192",
            "--custom_filename",
            "merged",
        ],
        cwd=REPO,
        check=True,
    )
    summary = json.loads((tmp_path / "merged.summary.json").read_text())
    for key in ("reward", "format", "mean_iou", "accuracy"):
        assert summary[key] == pytest.approx(lines[-1][f"val_{key}"], abs=1e-9), key


def test_another_run_in_the_same_folder_is_refused(undisturbed, tiny_data):
    out, _ = undisturbed
    before = (out / "metrics.jsonl").read_bytes()
    for overrides, message in (
        ({"learning_rate": 1e-5}, "learning_rate: 0.0003 there, 1e-05 here"),
        ({"resume": "never"}, "holds a run already"),
    ):
        done = subprocess.run(command(out, tiny_data, **overrides), cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


def test_another_run_can_start_from_a_checkpoint(undisturbed, tiny_data, tmp_path):
    """resume=PATH continues elsewhere; dead groups are replaced by other rows, within the rounds allowed."""
    out = tmp_path / "elsewhere"
    train(
        out,
        tiny_data,
        **(HF | {"steps": 4, "resume": undisturbed[0] / "checkpoint-3", "resample_dead_groups": 2}),
    )
    (line,) = metrics(out)
    assert line["step"] == 4 and 0 < line["replaced"] <= 8


# ---- messages ----
def run(*arguments, **env):
    return subprocess.run(
        [sys.executable, "train_grpo.py", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | env,
    )


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
