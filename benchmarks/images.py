"""What images cost a step of GRPO: encodes of each row that is trained on, and the time the step waits.

    OMP_NUM_THREADS=1 python benchmarks/images.py       # what `accelerate launch` sets

One of four processes: it samples N rows and trains on N, a quarter of them the same, in micro-batches of four
rows, twice for log-probs and once for the update. A GPU that works 0.1 s on a row is stood in for by sleep.
`plain` makes every prompt whole when it is asked for, in one thread; `ahead` is what the trainer does.
"""

import functools
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import PromptCache, PromptEncoder, Sample  # noqa: E402

GPU_S = 0.1  # a row


def photo(width: int, height: int, seed: int) -> dict:
    """A JPEG with structure of eight pixels and up, as photos have it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}


def step(prompt_of, sampled: list[int], trained: list[int]) -> float:
    """Seconds that a step waits for images: before it samples and in its three passes over trained rows."""
    waited = 0.0
    start = time.perf_counter()
    prompt_of["sample"](sampled)
    waited += time.perf_counter() - start
    batches = [trained[i : i + 4] for i in range(0, len(trained), 4)]
    for _ in range(3):
        for i, rows in enumerate(batches):
            start = time.perf_counter()
            prompt_of["train"](rows, batches[i + 1 : i + 3])
            waited += time.perf_counter() - start
            time.sleep(GPU_S * len(rows))
    return waited


def plain(encoder, samples):
    count = [0]

    @functools.lru_cache(len(samples))
    def prompt_of(row):
        count[0] += 1
        return encoder(samples[row])

    calls = {"sample": lambda rows: [prompt_of(row) for row in rows]}
    calls["train"] = lambda rows, _: [prompt_of(row) for row in rows]
    return calls, lambda: count[0]


def ahead(encoder, samples, threads: int):
    light = PromptCache(lambda row: encoder.for_engine(samples[row]), threads, 2**32)
    whole = PromptCache(
        lambda row: encoder.with_pixels(light.kept.get(row) or encoder.for_engine(samples[row])),
        threads,
        2**32,
    )

    def sample(rows):
        light.ahead(rows)
        return [light(row) for row in rows]

    def train(rows, following):
        for some in (rows, *following):
            whole.ahead(some)
        return [whole(row) for row in rows]

    return {"sample": sample, "train": train}, lambda: whole.made


def time_to_encode(samples, encoder, threads: int) -> float:
    cache = PromptCache(lambda row: encoder(samples[row]), threads)
    start = time.perf_counter()
    cache.ahead(range(len(samples)))
    for row in range(len(samples)):
        cache(row)
    return time.perf_counter() - start


def main():
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(Path(__file__).parent.parent / "assets" / "tiny")
    encoder = PromptEncoder(processor, "spatial_thinker", 512 * 512, 2048 * 2048)
    print(f"{'':12}{'':20}encodes a trained row   waiting s a step")
    for width, height, n in ((640, 480, 64), (2048, 2048, 16)):
        question = ("which is it?\nOptions:\n(A) a\n(B) b", ("a", "b"), "(A) a", "(A) a")
        samples = [
            Sample(str(k), (photo(width, height, k),), (width, height), *question) for k in range(2 * n)
        ]
        sampled, trained = [*range(n)], [*range(n - n // 4, 2 * n - n // 4)]
        encoder(samples[0])
        for name, (calls, made) in {
            "plain": plain(encoder, samples),
            "ahead, 1 thread": ahead(encoder, samples, 1),
            "ahead, 2 threads": ahead(encoder, samples, 2),
        }.items():
            waited = step(calls, sampled, trained)
            print(f"{f'{width}x{height}':12}{name:20}{made() / n:21.2f}{waited:19.2f}")
        seconds = [time_to_encode([samples[row] for row in trained], encoder, threads) for threads in (1, 2)]
        print(f"  two threads: {seconds[0] / seconds[1]:.2f} x the encodes of one a second")


if __name__ == "__main__":
    main()
