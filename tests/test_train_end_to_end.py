"""The real loop in real processes: vLLM samples, weights reach it, kill -9 and Ctrl-C lose nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bounds import U64, rounding
from programs import REPO, metrics, run_script, settings, start_script, wait_until
from safetensors.torch import load_file

import train_grpo
from answers import parse_choice
from checkpoint import check_files
from data import load_samples
from distributed import free_port
from merge import merge

pytestmark = pytest.mark.slow

# What float32 agrees to in trainer and vLLM (docs/metrics.md): ten times what is seen, far below what a stale
# weight costs.
AGREED = 1e-4


def grpo(out, data, **overrides):
    """Arguments of a small run of the demo."""
    small = dict(steps=4, val_every=2, val_limit=8, prompts_per_step=4, group_size=4, updates_per_step=2)
    small |= dict(kl_coef=0.01, learning_rate=3e-4, save_every=1, samples_every=2)
    return ["train_grpo.py", "configs/tiny.yaml", *settings(data=data, out=out, **small | overrides)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, run_script(*grpo(out, tiny_data)).stdout


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


def test_every_metric_is_in_the_glossary(undisturbed):
    """One meaning and one name: docs/metrics.md lists what a run writes, and nothing else."""
    table = (REPO / "docs" / "metrics.md").read_text().partition("## Of supervised training")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in row.replace("`", "").replace(",", " ").split()}
    written = set().union(*metrics(undisturbed[0], timings=True)) - {"step"}
    assert {name.removeprefix("val_") for name in written} == {name.removeprefix("val_") for name in listed}


def test_metrics_are_consistent(undisturbed, tiny_data):
    out, _ = undisturbed
    for m in metrics(out)[1:]:
        terms = 0.1 * m["format"] + 0.2 * m["count"] + 0.5 * m["exact"] + 0.2 * m["spatial"]
        assert m["reward"] == pytest.approx(terms, rel=rounding(16, 4, u=U64))  # means of 16 in float64
        assert m["grad_norm"] > 0 and m["entropy"] > 0 and m["skipped"] == 0
        assert sum(m["rejected"].values()) == round((1 - m["format"]) * 16)
    # `accuracy` is what evaluation would read of the samples, `exact` what the reward has seen of them.
    rows = {s.id: s for s in load_samples(str(tiny_data))}
    text = (out / "samples" / "step-00001" / "completions.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    read = [parse_choice(x["text"], rows[x["id"]].options) == rows[x["id"]].answer[1] for x in samples]
    first = metrics(out)[1]
    assert first["accuracy"] == sum(read) / 16 and first["exact"] == sum(x["accuracy"] for x in samples) / 16


def test_the_sampler_holds_the_policy_after_every_sync(undisturbed, tmp_path):
    """float32, vision tower training: log-probs agree after six updates, and the weights moved."""
    out, _ = undisturbed
    assert max(m["mismatch_max"] for m in metrics(out)[1:]) <= AGREED
    start = load_file(REPO / "assets" / "tiny" / "model.safetensors")
    end = load_file(merge(out, tmp_path / "merged", "float32") / "model.safetensors")
    moved = [k for k in start if not torch.equal(start[k].float(), end[k].float())]
    assert any("visual" in k for k in moved) and any("layers.3" in k for k in moved)


def interrupted(out, data, lines, number, **overrides):
    """A run that got the signal once so many metrics lines stood: (exit status, what it printed)."""
    process = start_script(*grpo(out, data, save_every=100, **overrides), stdout=subprocess.PIPE)
    wait_until(lambda: len(metrics(out)) >= lines, process)
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
    run_script(
        *grpo(out, tiny_data)
    )  # with an engine of its own, which has the weights and seeds of the first
    assert metrics(out) == metrics(undisturbed[0])


HF = dict(sampler="hf", steps=3, max_completion_length=80, val_every=0, tracker="none", samples_every=0)
HF |= dict(keep_last=1)


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory):
    """Metrics of a run of two processes that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight")
    run_script(*grpo(out, tiny_data, **HF), processes=2)
    return metrics(out)


def test_sigterm_saves_and_exits_with_its_own_status(tiny_data, tmp_path):
    """As after Ctrl-C; who started it sees that the run is to go on."""
    out = tmp_path / "preempted"
    status, printed = interrupted(out, tiny_data, 1, signal.SIGTERM, **HF)
    assert status == 75 and "continue with: " in printed and len(metrics(out)) < 3
    check_files(out / f"checkpoint-{metrics(out)[-1]['step']}")


# ---- one and two processes, killed everywhere ----
def start_on_two_nodes(*arguments, **options) -> list[subprocess.Popen]:
    """The commands of docs/recovery.md, of one process a node: this machine stands for both."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 2, "--num_processes", 2]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    return [start_script(*launch, "--machine_rank", rank, *arguments, **options) for rank in (0, 1)]


def test_killed_at_every_phase_and_resumed(straight, tiny_data, tmp_path):
    """A run, killed in a rollout, between updates, after a log line and while it saves."""
    killed = grpo(tmp_path / "killed", tiny_data, **HF)
    for moment in [("rollout", 1), ("update", 2), ("log", 1), ("save", 2)]:
        run_script("tests/kill_at.py", *moment, *killed[1:], processes=2, status=-signal.SIGKILL)
    run_script(*killed, processes=2)
    lines = metrics(tmp_path / "killed")
    assert len(lines) == 3 and all(m["grad_norm"] > 0 for m in lines)
    assert lines == straight
    assert max(m["mismatch_max"] for m in lines) <= AGREED
    assert [p.name for p in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]


def test_two_nodes_compute_what_one_does(straight, tiny_data, tmp_path):
    nodes = start_on_two_nodes(*grpo(tmp_path, tiny_data, **HF))
    assert [node.wait(240) for node in nodes] == [0, 0]
    assert metrics(tmp_path) == straight


def test_sigterm_to_one_node_stops_both_and_saves(tiny_data, tmp_path):
    """Each process is saved whole though the launcher of only one of them got the signal."""
    out = tmp_path / "preempted"
    frozen = HF | {"steps": 50, "save_every": 100, "freeze_vision": True}
    longer = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    nodes = start_on_two_nodes(*grpo(out, tiny_data, **frozen), stdout=subprocess.PIPE, env=longer)
    wait_until(lambda: metrics(out), nodes[0])
    nodes[1].send_signal(signal.SIGTERM)
    printed, _ = nodes[0].communicate(timeout=240)
    nodes[1].communicate(timeout=240)
    assert "continue with: accelerate launch train_grpo.py" in printed
    done = metrics(out)[-1]["step"]
    assert done < 50
    start = load_file(REPO / "assets" / "tiny" / "model.safetensors")
    end = load_file(merge(out / f"checkpoint-{done}", tmp_path / "merged") / "model.safetensors")
    moved = {k for k in start if not torch.equal(start[k], end[k])}
    assert moved and not any(k.startswith("visual") for k in moved)


def sampled(out) -> list[str]:
    path = out / "samples" / "step-00001" / "completions.jsonl"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes_with_vllm(tensor_parallel, undisturbed, tiny_data, tmp_path):
    """FSDP2 shards, an engine each or one for both: the sampler holds the policy after every sync."""
    out = tmp_path / "two"
    Path("/dev/shm/-tp:0-[0-1]-cpushm_0").write_bytes(b"left by a run that was killed")
    several = dict(steps=3, tensor_parallel=tensor_parallel, val_every=3, val_limit=24)
    run_script(*grpo(out, tiny_data, **several), processes=2)
    lines, alone = metrics(out), metrics(undisturbed[0])
    assert max(m["mismatch_max"] for m in lines[1:]) <= AGREED
    # The first step samples from the same weights with the same seeds. Where two tokens are equally likely to
    # the last bits another order of summation may draw the other one: that happens to one text in a thousand.
    texts = sampled(undisturbed[0])
    agree = sum(a == b for a, b in zip(sampled(out), texts, strict=True))
    assert len(texts) == 16 and agree >= 15
    if agree == 16:
        assert lines[1]["reward"] == alone[1]["reward"] and lines[1]["tokens"] == alone[1]["tokens"]
        # Two updates, the second from weights that AdamW may have moved the other way where a gradient is 0.
        assert lines[1]["grad_norm"] == pytest.approx(alone[1]["grad_norm"], rel=1e-2)
    if tensor_parallel == 2:
        return
    # Sharded over two, merged in one: the folder answers as the trainer's engine did.
    merged = merge(out, tmp_path / "merged", "float32")
    flags = ["--dataset", tiny_data / "val.parquet", "--model_path", merged, "--provider", "hf"]
    flags += ["--min_pixels", "784", "--max_new_tokens", "192", "--out", tmp_path]
    run_script("evaluate.py", *flags, "--custom_filename", "merged")
    summary = json.loads((tmp_path / "merged.summary.json").read_text())
    for key in ("reward", "format", "exact", "accuracy"):  # as above, of 24 greedy answers one may differ
        assert summary[key] == pytest.approx(lines[-1][f"val_{key}"], abs=1 / 24 + 1e-9), key


def here(monkeypatch, *arguments, **overrides):
    """The program in this process, which spares a start. Raises: SystemExit."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", grpo(*arguments, **overrides))
    train_grpo.main()


def test_another_run_in_the_same_folder_is_refused(undisturbed, tiny_data, monkeypatch):
    out, _ = undisturbed
    before = (out / "metrics.jsonl").read_bytes()
    for overrides, message in (
        ({"learning_rate": 1e-5}, "learning_rate: 0.0003 there, 1e-05 here"),
        ({"resume": "never"}, "holds a run already"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            here(monkeypatch, out, tiny_data, **overrides)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_another_run_can_start_from_a_checkpoint(undisturbed, tiny_data, tmp_path, monkeypatch):
    """resume=PATH continues elsewhere; dead groups are replaced by other rows, within the rounds allowed.

    No completion of 8 tokens is well formed, so that all groups are dead.
    """
    out, start = tmp_path / "elsewhere", undisturbed[0] / "checkpoint-3"
    dead = {"steps": 4, "resume": start, "resample_dead_groups": 2, "max_completion_length": 8}
    here(monkeypatch, out, tiny_data, **HF | dead)
    (line,) = metrics(out)
    assert line["step"] == 4 and 0 < line["replaced"] <= 8


def test_the_sparse_baseline_has_no_figures_of_scenes(tiny_data, tmp_path, monkeypatch):
    here(monkeypatch, tmp_path, tiny_data, **HF | {"steps": 1, "reward": "vanilla", "template": "reasoning"})
    (line,) = metrics(tmp_path)
    assert not {"count", "spatial", "mean_iou"} & set(line)
    both = 0.5 * line["exact"] + 0.5 * line["format"]
    assert line["reward"] == pytest.approx(both, rel=rounding(16, 2, u=U64))  # means of 16 in float64


OWN = """
def brief(completion, row):
    return {"reward": 1 / (1 + len(completion)), "chars": len(completion), "ids": len(row["image_id"])}

def fails(completion, row):
    return float("nan")
"""


def test_a_reward_function_of_ones_own(tiny_data, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    short = HF | {"max_completion_length": 8}
    here(
        monkeypatch,
        tmp_path / "a",
        tiny_data,
        **short | {"steps": 1, "val_every": 1, "reward": f"{path}:brief"},
    )
    first, line = metrics(tmp_path / "a")
    assert 0 < line["reward"] < 1 and line["reward/chars"] > 0 and line["reward/ids"] == 12
    assert first["val_reward"] > 0 and not {"format", "count", "mean_iou"} & set(line)
    ended = {"fails": "row train-.*: ValueError: expected reward to be a finite number, got nan"}
    for name, message in (ended | {"gone": "reward .*:gone: expected a function 'gone' in"}).items():
        with pytest.raises(SystemExit, match=f"error: {message}"):
            here(monkeypatch, tmp_path / name, tiny_data, **short | {"reward": f"{path}:{name}"})
        assert not list((tmp_path / name).glob("checkpoint-*"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        here(monkeypatch, tmp_path / "b", tiny_data, reward=f"{path}:gone", dry_run=True, sampler="hf")
    (missing,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("missing: reward")]
    assert "expected a function 'gone' in" in missing and "['brief', 'fails']" in missing


# ---- messages ----
def test_a_typo_is_named_with_the_nearest_key():
    done = run_script("train_grpo.py", "configs/tiny.yaml", "learnig_rate=1", status=2)
    assert "Traceback" not in done.stderr
    assert "learnig_rate" in done.stderr and "did you mean 'learning_rate'" in done.stderr
