"""Completions per second of the spatial reward on one core.

    python benchmarks/bench_rewards.py        (15 s)

The first line is a step of the paper: 512 prompts x 8 completions, 8 gold objects, 1,000 characters or more.
Target: under 2 s for its 4,096 completions. Each prompt has its own gold; labels repeat as in a data set.
"""

import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from rewards import score_completion  # noqa: E402

SIZE = (640, 480)
NOUNS = ("car", "dog", "traffic_light", "table", "cups")
LABELS = [adjective + noun for adjective in ("", "red_", "wooden_", "left_") for noun in NOUNS]


def box(rng):
    x, y = rng.uniform(0, 560), rng.uniform(0, 400)
    return [round(c, 1) for c in (x, y, x + rng.uniform(8, 80), y + rng.uniform(8, 80))]


def scene(rng, objects, relationships):
    ids = [f"{rng.choice(LABELS)}.{i}" for i in range(objects)]
    ends = rng.sample(list(itertools.permutations(ids, 2)), relationships)  # no pair twice
    graph = {
        "objects": [{"id": i, "bbox": box(rng)} for i in ids],
        "relationships": [{"subject": s, "predicate": "left of", "object": o} for s, o in ends],
    }
    return f"<scene>{json.dumps(graph)}</scene>"


def completion(rng, objects, relationships, chars):
    head = f"<observe>A street.</observe>\n{scene(rng, objects, relationships)}\n<think>"
    tail = f"</think>\n<answer>({rng.choice('AB')}) left</answer>"
    return head + "so " * max(1, (chars - len(head) - len(tail)) // 3 + 1) + tail


def run(name, prompts, group, objects, relationships, chars=1000):
    rng = random.Random(0)
    gold = [scene(rng, objects, relationships) + "\n<answer>(A) left</answer>" for _ in range(prompts)]
    work = [(completion(rng, objects, relationships, chars), g) for g in gold for _ in range(group)]
    score_completion(*work[0], SIZE)  # scipy is imported by the first match
    seconds = []
    for _ in range(3):
        # Fresh golds every round, as every step of a run brings new prompts.
        golds = {g: f"{g}{' ' * len(seconds)}" for g in gold}
        start = time.perf_counter()
        scores = [score_completion(text, golds[g], SIZE) for text, g in work]
        seconds.append(time.perf_counter() - start)
    assert all(s.format == 1 for s in scores), "the benchmark's completions are well formed"
    n, best, length = len(work), min(seconds), sum(len(text) for text, _ in work) // len(work)
    print(f"{name:24} {n:6} x {length:6} characters {best:7.3f} s {n / best:9.0f} completions/s")


if __name__ == "__main__":
    run("paper step, 8 objects", 512, 8, 8, 6)
    run("small scene, 2 objects", 512, 8, 2, 1, chars=400)
    run("large scene, 24 objects", 128, 8, 24, 20)
    run("no objects", 512, 8, 0, 0)
    run("at the caps, 256 objects", 4, 4, 256, 256)
