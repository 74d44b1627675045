"""The trainer, killed with all its processes by SIGKILL at a chosen moment of its run.

    python tests/kill_at.py MOMENT COUNT configs/tiny.yaml key=value ...

MOMENT is one of MOMENTS, COUNT the occurrence that kills. Under torchrun the launcher dies with them.
"""

import os
import signal
import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import train_grpo  # noqa: E402

MOMENTS = {  # name: where the function of the same moment is looked up
    "rollout": (train_grpo, "sample_everywhere"),
    "update": (train_grpo, "update"),
    "log": (train_grpo, "step_line"),  # the metrics' line is written
    "save": (checkpoint, "rng_state"),  # weights and optimizer are written, nothing is renamed
    "renamed": (checkpoint, "rotate"),  # the old ones are still there
}


def kill_all():
    me = psutil.Process()
    family = [me]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the launcher goes first, lest it tidy up
        family = [me.parent(), *me.parent().children(recursive=True)]
    for process in sorted(family, key=lambda p: p == me):
        process.send_signal(signal.SIGKILL)


def main():
    moment, count, sys.argv = sys.argv[1], int(sys.argv[2]), ["train_grpo.py", *sys.argv[3:]]
    module, name = MOMENTS[moment]
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and os.environ.get("RANK", "0") == "0":
            kill_all()
        return original(*args, **kwargs)

    setattr(module, name, counted)
    train_grpo.main()


if __name__ == "__main__":
    main()
