"""Two processes with FSDP2 shards compute what one computes, and read each other's checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parent.parent


def torchrun(processes, *arguments, timeout=300):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            *map(str, arguments),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module", params=["tied", "untied"])
def worlds(request, tiny_base, tiny_data, tmp_path_factory):
    """The same updates by one process and by two: {1: results, 2: results}."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.from_pretrained(tiny_base)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = request.param == "tied"
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    AutoProcessor.from_pretrained(tiny_base).save_pretrained(folder / "model")
    for n in (1, 2):
        arguments = ["tests/ranks.py", folder / "model", tiny_data, folder / f"world-{n}"]
        done = (
            torchrun(2, *arguments)
            if n == 2
            else subprocess.run(  # alone, nothing is sharded
                [sys.executable, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, timeout=300
            )
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {n: torch.load(folder / f"world-{n}" / "result.pt") for n in (1, 2)}


def distance(a: dict, b: dict) -> float:
    """Relative distance of two sets of named tensors."""
    assert a.keys() == b.keys()
    gap = sum(float((a[k] - b[k]).double().square().sum()) for k in a) ** 0.5
    return gap / sum(float(a[k].double().square().sum()) for k in a) ** 0.5


def test_gradients_and_weights_are_those_of_one_process(worlds):
    """Uneven lengths, text-only prompts alone on a process, and (third update) a process without any work."""
    for k in range(3):
        assert distance(worlds[1]["gradients"][k], worlds[2]["gradients"][k]) < 1e-5
        assert worlds[1]["norms"][k] == pytest.approx(worlds[2]["norms"][k], rel=1e-5)
        assert distance(worlds[1]["weights"][k], worlds[2]["weights"][k]) < 1e-5
        assert worlds[1]["sums"][k] == pytest.approx(worlds[2]["sums"][k], rel=1e-5)
    assert min(worlds[1]["norms"]) > 0 and worlds[1]["sums"][0][1] > 0  # there was something to compare
    for name, g in worlds[2]["gradients"][0].items():  # every layer of both towers learns
        assert g.abs().max() > 0, name


def test_a_checkpoint_continues_exactly_and_across_world_sizes(worlds):
    for n in (1, 2):
        for name, p in worlds[n]["weights"][2].items():
            assert torch.equal(p, worlds[n]["continued"][0][name]), name
    assert distance(worlds[1]["weights"][2], worlds[2]["continued"][1]) < 1e-5


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(worlds):
    for n in (1, 2):
        message = worlds[n]["full_disk"]
        assert "checkpoint-3 could not be written (process" in message
        assert message.endswith("checkpoint-2 is whole")
        assert "checkpoint-2" in worlds[n]["files"]
        assert not [name for name in worlds[n]["files"] if name.startswith("checkpoint-3")]


def test_supervised_training_of_uneven_work_on_two_processes(tiny_base, tiny_data, tmp_path):
    """One process has more micro-batches than the other; a hang is a timeout here."""
    small = {
        "model": tiny_base,
        "data": tiny_data,
        "out": tmp_path / "sft",
        "target": "scene_answer",
        "template": "spatial_thinker",
        "lora_rank": 0,
        "epochs": 0.25,
        "batch_size": 3,
        "val_limit": 3,
        "val_every": 1,
        "max_tokens_per_micro_batch": 200,
        "min_pixels": 784,
        "log_every": 1,
    }
    done = torchrun(2, "train_sft.py", *(f"{k}={v}" for k, v in small.items()), timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "sft" / "final" / "model.safetensors").exists()
