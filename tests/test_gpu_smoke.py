"""benchmarks/gpu_smoke.py: what it can do on a CPU, what it says of failures, and that planted ones fail."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import run_script

import packing
from benchmarks import gpu_smoke
from benchmarks.gpu_smoke import Report, Skip, lay_out, run_stage, start_stage, update_flops


# ---- bounds that notice ----
@pytest.mark.parametrize("stage", ["attention", "head"])
def test_what_is_right_passes(stage, tmp_path):
    line = run_stage(stage, tmp_path)
    assert line["status"] == "passed", line
    assert json.loads(json.dumps(line)) == line


def test_attention_that_sees_one_token_too_many_fails(monkeypatch, tmp_path):
    right = packing.packed_attention

    def wrong(*row, segments, **kwargs):
        later = tuple(
            (start, end, a, b + (b > 0)) for start, end, a, b in segments
        )  # another one's first token
        return right(*row, segments=later, **kwargs)

    monkeypatch.setattr(packing, "packed_attention", wrong)
    line = run_stage("attention", tmp_path)
    assert line["status"] == "failed" and "text_used_out" in line["error"] and "dq" in line["error"]


def test_logits_in_bf16_fail(monkeypatch, tmp_path):
    right = packing.ChunkedLogProbs.logits
    rounded = staticmethod(lambda *args: right(*args).bfloat16().float())
    monkeypatch.setattr(packing.ChunkedLogProbs, "logits", rounded)
    line = run_stage("head", tmp_path)
    assert line["status"] == "failed" and "logp_error" in line["error"]
    assert line["figures"]["logp_error"] == pytest.approx(
        line["figures"]["logp_error_of_bf16_logits"], rel=0.5
    )


def test_segments_by_hand():
    one = ((0, 3, 0, 0), (3, 5, 0, 3), (5, 7, 0, 3))
    assert lay_out(1, 3, 2, 2) == one
    assert lay_out(2, 3, 2, 2) == (*one, (7, 10, 0, 0), (10, 12, 7, 10), (12, 14, 7, 10))


def test_operations_by_hand():
    linear = torch.nn.Linear
    base = SimpleNamespace(
        config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=7, hidden_size=4, num_hidden_layers=2)),
        model=SimpleNamespace(
            language_model=SimpleNamespace(layers=torch.nn.ModuleList([linear(4, 5, bias=False)] * 1)),
            visual=SimpleNamespace(blocks=torch.nn.ModuleList([linear(3, 2, bias=False)])),
        ),
    )
    packed = {
        "input_ids": torch.zeros(1, 5),
        "target_ids": torch.zeros(2),
        "pixel_values": torch.zeros(11, 1),
        "segments": ((0, 3, 0, 0), (3, 5, 0, 3)),
    }
    # 20 parameters x 5 tokens, 7 x 4 x 2 of the head, 6 x 11 patches; the prompt's 1 + 2 + 3 pairs, and the
    # completion's 3 + 3 and 1 + 2.
    assert update_flops(base, packed) == 6 * (20 * 5 + 7 * 4 * 2 + 6 * 11) + 12 * 2 * 4 * (6 + 6 + 3)


# ---- what is said of failures ----
def say(monkeypatch, stage):
    monkeypatch.setitem(gpu_smoke.STAGES, "stage", (stage, 1))
    line = run_stage("stage", Path())
    return line["status"], line["figures"], line.get("error")


def test_a_stage_says_what_it_measured_and_all_that_failed(monkeypatch):
    def stage(report: Report, scratch):
        report.add(speed=1 / 3, absent=None)
        report.at_most("small", 0.5, 1)
        report.at_most("large", 2.0, 1)
        report.at_most("strange", float("nan"), 1)
        raise RuntimeError("first\nlast")

    status, figures, error = say(monkeypatch, stage)
    assert status == "failed" and figures == {"speed": 0.3333, "small": 0.5, "large": 2.0, "strange": "nan"}
    assert error == "large 2, expected at most 1; strange nan, expected at most 1; RuntimeError: last"


def test_a_stage_that_cannot_run_says_why(monkeypatch):
    def stage(report, scratch):
        raise Skip("no GPU")

    assert say(monkeypatch, stage) == ("skipped", {}, "no GPU")
    assert say(monkeypatch, lambda *at: None) == ("passed", {}, None)


@pytest.mark.slow
def test_a_stage_that_dies_or_hangs_costs_only_itself(tmp_path):
    line = start_stage("no_such_stage", 60, tmp_path, tmp_path / "log")
    assert line["status"] == "failed" and line["error"].startswith("ended with status 2: ")
    done = run_script("benchmarks/gpu_smoke.py", "fork", "versions", "--minutes", 0, status=1)
    printed = done.stdout.splitlines()
    for text, log, name in ((printed[0], printed[1], "fork"), (printed[2], printed[3], "versions")):
        line = json.loads(text)
        assert (line["stage"], line["status"], line["error"]) == (name, "failed", "not done after 0 s")
        assert Path(log.removeprefix("its log: ")).is_file()
    assert printed[-1] == "0 passed, 2 failed, 0 skipped"


# ---- the script ----
@pytest.mark.slow
def test_the_script_on_a_cpu():
    stages = ["fork", "model", "checkpoint", "grpo_hf"]
    done = run_script("benchmarks/gpu_smoke.py", *stages, status=None)
    lines = {line["stage"]: line for line in map(json.loads, done.stdout.splitlines()[: len(stages)])}
    states = {name: line["status"] for name, line in lines.items()}
    assert states == dict.fromkeys(stages, "passed") | {"fork": "skipped"}, done.stdout
    assert done.returncode == 0 and done.stdout.endswith("3 passed, 0 failed, 1 skipped\n")
    model, checkpoint, grpo = (lines[name]["figures"] for name in stages[1:])
    assert model["policy_minus_reference"] == model["log_ratio_before_the_first_update"] == 0
    assert model["kl_1"] == 0 < model["kl_2"] and model["tokens_per_s"] > 0
    assert checkpoint["resumed_tensors_that_differ"] == checkpoint["merged_tensors_that_differ"] == 0
    assert (
        grpo["mismatch_2_max"] < 1e-4 < grpo["mismatch_of_stale_weights"]
    )  # float32, as docs/metrics.md has it
