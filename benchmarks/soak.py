"""Host memory over a long run on the drawn set: vLLM samples, the trainer updates, and nothing may grow.

    python synthesize.py out=runs/drawn
    python benchmarks/soak.py [steps=200] [key=value ...]       (8 minutes for 200 steps)

configs/tiny.yaml with 8 prompts of 4 completions a step, in a folder that is removed. Prints what the
process holds, files mapped from disk left out, after every tenth step, and the slope of a straight line
through the last half; ends with status 1 where that is too steep. The first half is warm-up: oneDNN keeps
1,024 compiled products, one for every number of sequences and layer shape, about 250 MB in vLLM.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_grpo  # noqa: E402
from distributed import leave  # noqa: E402

# A third of the smallest thing that a step could leave behind: its 8 images as vLLM processes them, 9 patches
# of 1,176 float32 each, 0.34 MB.
STEEPEST = 8 * 9 * 1176 * 4 / 1e6 / 3  # MB a step
SMALL = ["configs/tiny.yaml", "steps=200", "prompts_per_step=8", "group_size=4", "val_every=0"]
SMALL += ["save_every=1000000", "samples_every=0", "tracker=none", "resume=never"]


def held_mb() -> float:
    """Memory of this process that no file backs, MB (Linux)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024 / 1e6


def main():
    held, draw = [], train_grpo.batch_at

    def measured(*args):  # a step begins: what the last one used is free
        held.append(held_mb())
        if len(held) % 10 == 1:
            print(f"after {len(held) - 1:4} steps {held[-1]:8.1f} MB", flush=True)
        return draw(*args)

    train_grpo.batch_at = measured
    with tempfile.TemporaryDirectory() as out:
        given = {argument.split("=")[0] for argument in sys.argv[1:]}
        small = [argument for argument in SMALL if argument.split("=")[0] not in given]
        sys.argv = ["train_grpo.py", *small, *sys.argv[1:], f"out={out}/run"]
        train_grpo.main()
    late = held[len(held) // 2 :]
    slope = np.polyfit(range(len(late)), late, 1)[0]
    print(f"last {len(late)} steps: {slope:+.3f} MB a step (at most {STEEPEST:.3f}), peak {max(held):.0f} MB")
    return int(slope > STEEPEST)


if __name__ == "__main__":
    status = main()
    if status:
        raise SystemExit(status)
    leave()
