"""The project's programs as users start them: alone or on several processes, to the end or to a moment."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
TIMINGS = ("gen_s", "logp_s", "update_s", "sync_s", "gen_tokens_per_s", "update_tokens_per_s", "mem_gb")
TIMINGS += ("seconds", "tokens_per_s")  # of the supervised trainer


def command(*arguments, processes: int = 1) -> list[str]:
    """python ARGUMENTS, by torchrun if there are several processes."""
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    several += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [sys.executable, *(several if processes > 1 else []), *map(str, arguments)]


def run_script(*arguments, processes: int = 1, timeout: float = 300, status: int | None = 0, **env):
    """Run a script to its end in the repository. Returns: CompletedProcess with texts.

    Args: status: expected exit status, None: any; env: further environment variables.
    """
    done = subprocess.run(
        command(*arguments, processes=processes),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | env,
    )
    assert status in (None, done.returncode), f"{done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def start_script(*arguments, processes: int = 1, **options) -> subprocess.Popen:
    """Start a script in the repository, silent unless `options` of Popen say otherwise."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True, "cwd": REPO}
    return subprocess.Popen(command(*arguments, processes=processes), **quiet | options)


def wait_until(condition, process: subprocess.Popen | None = None, seconds: float = 240, every: float = 0.02):
    """Wait until condition() holds. Fails when the process ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended with status {process.returncode}"
        assert time.monotonic() < deadline, f"waited for {seconds} s"
        time.sleep(every)


@contextlib.contextmanager
def limited(size: int):
    """No file of this process grows beyond so many bytes: a full disk, but for the number of its error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def settings(**pairs) -> list[str]:
    """key=value arguments."""
    return [f"{key}={value}" for key, value in pairs.items()]


def metrics(out, timings: bool = False) -> list[dict]:
    """The whole lines of a run's metrics.jsonl, without what depends on the machine's speed."""
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return found if timings else [{k: v for k, v in m.items() if k not in TIMINGS} for m in found]
