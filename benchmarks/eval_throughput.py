"""How fast evaluation is: our vLLM and transformers paths, and a plain loop, on the same model and items.

    python benchmarks/eval_throughput.py            # about 5 minutes on two cores

Every path runs alone in a process of its own and is timed from its first prompt to its last reply, the model
being loaded. The plain loop is what evaluators usually do: four items at a time through the processor and
`generate`. Two models: the tiny one (2.5 million parameters, 512 items) and an untrained one of 77 million,
64 items of 64 tokens. Then: replies read and graded in a second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from data import PromptEncoder, load_samples  # noqa: E402

PIXELS = (784, 802816)


class Timed(PromptEncoder):
    """Notes when the first image is asked for, which every path does once its model is loaded."""

    started = None

    def images(self, sample):
        self.started = self.started or time.time()
        return super().images(sample)


def plain_loop(model_path, samples, encoder, decoding):
    """Replies of four items at a time."""
    import torch
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.processor.tokenizer.padding_side = "left"
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype).to(device).eval()
    for start in range(0, len(samples), 4):
        batch = samples[start : start + 4]
        images = [image for s in batch for image in encoder.images(s)]
        inputs = encoder.processor(
            text=[encoder.text(s) for s in batch], images=images, padding=True, return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=decoding.max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        yield from enumerate(encoder.processor.batch_decode(new, skip_special_tokens=True), start)


def time_path(path: str, model_path: str, data: str, n: int, tokens: int):
    """Print the items per second of one path as JSON."""
    from transformers import AutoProcessor

    from apis import Decoding
    from backends import PROVIDERS

    samples = load_samples(data, "val")[:n]
    encoder = Timed(AutoProcessor.from_pretrained(model_path), "spatial_thinker", *PIXELS)
    decoding = Decoding(tokens, batch_size=256 if path == "vllm" else 8)
    replies = (PROVIDERS | {"plain": plain_loop})[path](model_path, samples, encoder, decoding)
    done = sum(1 for _ in replies)
    seconds = time.time() - encoder.started
    assert done == len(samples) > 0  # yes and no come in pairs: a set may be an item short of n
    print(json.dumps({"items_per_s": done / seconds}))


def grade_speed(data: str):
    """(replies read, replies graded with their scenes) in a second."""
    from answers import parse_choice
    from results import grade

    samples = load_samples(data, "val")[:]
    work = []
    for s in samples:
        scene = s.ground_truth.partition("\n")[0]
        reply = f"<observe>o</observe>{scene}<think>so it is</think><answer>{s.answer}</answer>"
        work.append((s, reply))
    speeds = []
    for repeat, one in ((40, lambda s, reply: parse_choice(reply, s.options)), (4, grade)):
        started = time.time()
        for s, reply in work * repeat:
            one(s, reply)
        speeds.append(repeat * len(work) / (time.time() - started))
    return speeds


def larger_model(folder: Path):
    """The tiny model's architecture at a width of 768 and 12 layers, with random weights."""
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(REPO / "assets" / "tiny")
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 768, 2048, 12
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 12, 4, ["full_attention"] * 12
    text.rope_parameters = text.rope_parameters | {"mrope_section": [8, 12, 12]}
    vision.out_hidden_size = 768
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(REPO / "assets" / "tiny").save_pretrained(folder)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--path", nargs=5, help=argparse.SUPPRESS)  # path, model, data, items, tokens
    args = p.parse_args()
    if args.path:
        path, model, data, n, tokens = args.path
        return time_path(path, model, data, int(n), int(tokens))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, REPO / "synthesize.py", f"out={folder}", "n_train=1", "n_val=512"],
            check=True,
            capture_output=True,
        )
        larger_model(Path(folder) / "larger")
        data = f"{folder}/val.parquet"
        for model, n, tokens in ((REPO / "assets" / "tiny", 512, 192), (Path(folder) / "larger", 64, 64)):
            speeds = {}
            for path in ("plain", "hf", "vllm"):
                command = [sys.executable, __file__, "--path", path, str(model), data, str(n), str(tokens)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
                speeds[path] = json.loads(done.stdout.splitlines()[-1])["items_per_s"]
                print(
                    f"{model.name:<7} {path:<6} {speeds[path]:7.2f} items/s, "
                    f"{speeds[path] / speeds['plain']:.1f} x the plain loop",
                    flush=True,
                )
        read, graded = grade_speed(data)
        print(f"replies read: {read:,.0f} a second; graded with their scenes: {graded:,.0f} a second")


if __name__ == "__main__":
    main()
