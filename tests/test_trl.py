"""`trl_spatial_reward` inside a real GRPOTrainer run of the tiny model."""

from pathlib import Path

import pytest

ASSETS = Path(__file__).parent.parent / "assets" / "tiny"


@pytest.mark.slow
def test_a_real_trl_run_earns_our_reward(tiny_data, tmp_path):
    from datasets import Dataset, Features, Image, Value
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    from data import build_prompt_text, load_samples
    from rewards import spatial_reward, trl_spatial_reward

    rows = []
    for s in load_samples(str(tiny_data), limit=8):
        text = build_prompt_text("spatial_thinker", s.question, s.size)
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "image": s.load_images()[0],
                "answer_option_text": s.ground_truth,
            }
        )
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"prompt": message, "image": Image(), "answer_option_text": Value("string")})
    earned = []

    def reward(completions, prompts, answer_option_text, **columns):
        values = trl_spatial_reward(completions, answer_option_text, prompts=prompts, **columns)
        earned.extend(zip(completions, answer_option_text, values, strict=True))
        return values

    processor = AutoProcessor.from_pretrained(ASSETS)
    processor.tokenizer.padding_side = "left"
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=112,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=str(ASSETS),
        reward_funcs=reward,
        args=arguments,
        processing_class=processor,
        train_dataset=Dataset.from_list(rows, features=features),
    )
    trainer.train()
    (logged,) = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(earned) == 8
    for completion, gold, value in earned:
        assert value == spatial_reward(completion[0]["content"], gold, (84, 84))["reward"]
    # TRL averages 8 numbers up to 1 in float32: each, and each partial sum, is off by 2**-24 of itself.
    assert logged == pytest.approx(sum(value for *_, value in earned) / 8, abs=9 * 2.0**-24)
    # All 8 are well formed here, which earns 0.3 or more; a CPU that rounds otherwise samples other texts.
    assert logged > 0.1, earned
