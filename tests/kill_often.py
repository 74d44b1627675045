"""synthesize.py, killed by SIGKILL at random moments until it gets to its end.

    python tests/kill_often.py KILLS SEED key=value ...

Each start is a fork of one process that has imported everything, so that a start costs milliseconds. Prints
the number of kills. The last start is left alone.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import openai  # noqa: E402, F401

import synthesize  # noqa: E402


def start(arguments) -> int:
    """Run the command in a child. Returns: its process id."""
    pid = os.fork()
    if pid:
        return pid
    sys.argv = ["synthesize.py", *arguments]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    status = 1
    try:
        synthesize.main()
        status = 0
    finally:
        os._exit(status)


def main():
    kills, rng, arguments = int(sys.argv[1]), random.Random(int(sys.argv[2])), sys.argv[3:]
    killed, longest = 0, 0.05
    while killed < kills:
        pid, began = start(arguments), time.monotonic()
        end = began + rng.uniform(0, longest)
        done = 0
        while not done and time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)
        if done:
            assert status == 0, status
            break  # faster than it was killed
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed, longest = killed + 1, min(longest * 1.3, 1.5)
    else:
        _, status = os.waitpid(start(arguments), 0)
        assert status == 0, status
    print(killed)


if __name__ == "__main__":
    main()
