"""Processes: what their launcher may ask for, and that they take turns."""

import subprocess
import sys

import psutil
import pytest
from programs import REPO, run_script

from distributed import refuse_lone_processes, refuse_other_sharding, return_freed_memory

TURNS = """
import sys, time
sys.path.insert(0, {repo!r})
from distributed import in_turn, leave, make_accelerator

accelerator = make_accelerator([])
with in_turn(accelerator):
    began = time.monotonic()
    time.sleep(0.5)
    print(f"turn {{began}} {{time.monotonic()}}", flush=True)
accelerator.wait_for_everyone()
leave()
"""


@pytest.mark.parametrize("env, kind", [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
    ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
    ({}, None),
])  # fmt: skip
def test_another_kind_of_sharding_is_refused_by_name(env, kind, monkeypatch):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if kind is None:
        return refuse_other_sharding()
    with pytest.raises(ValueError, match=f"expected no sharding of its own.* got {kind} .from .*MULTI_GPU"):
        refuse_other_sharding()


def test_a_process_of_several_that_nobody_launched_is_refused(monkeypatch):
    """What `accelerate launch --num_processes 2` without --multi_gpu sets on a machine without two GPUs."""
    for name in ("ACCELERATE_MIXED_PRECISION", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    refuse_lone_processes()  # python train_grpo.py, in a job whose script sets the address
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(ValueError, match="expected a process that knows its rank, got none: add --multi_gpu"):
        refuse_lone_processes()
    monkeypatch.setenv("RANK", "0")
    refuse_lone_processes()


def test_holes_in_the_heap_return_to_the_system():
    """Every other block of 100 kB is freed: all of it comes back but the pages at the ends of a hole."""
    blocks = [b"x" * 100_000 for _ in range(1000)]  # too small for glibc to map each by itself
    del blocks[::2]
    before = psutil.Process().memory_info().rss
    return_freed_memory()
    assert before - psutil.Process().memory_info().rss > 500 * (100_000 - 2 * 4096)


@pytest.mark.slow
def test_the_launchers_own_config_file_is_refused_in_one_line(tiny_data, tmp_path):
    """As users meet it: accelerate launch, with a file that some other project has left."""
    config = tmp_path / "default_config.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nuse_cpu: true\n"
                      "fsdp_config:\n  fsdp_version: 1\nnum_processes: 1\n")  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "train_grpo.py",
    ]
    launch += ["configs/tiny.yaml", f"data={tiny_data}", f"out={tmp_path / 'run'}"]
    done = subprocess.run(launch, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert "error: accelerate launch: expected no sharding of its own" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_take_turns(tmp_path):
    (tmp_path / "turns.py").write_text(TURNS.format(repo=str(REPO)))
    printed = run_script(tmp_path / "turns.py", processes=2).stdout
    turns = sorted(tuple(map(float, line.split()[1:])) for line in printed.splitlines() if "turn" in line)
    assert len(turns) == 2 and turns[0][1] <= turns[1][0]  # the second begins when the first has ended
