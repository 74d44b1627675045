"""How fast scene graphs are read and cleaned, and in how much memory.

    python benchmarks/graphs.py                   # 56,000 graphs, as many as the paper: 2 min, 1.2 GB of disk
    python benchmarks/graphs.py --n 2000

A folder of Visual Genome is drawn by lot, with 35 objects and 21 relations a graph and the flaws of the real
one. Targets: 2,000 graphs a second read, less than 1 GB of memory. Reading is timed with all files in the
same order, then with relationships.json in another one: its records are then sought one by one.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from graph_files import write_big_vg  # noqa: E402

from scenes import RawGraph, clean  # noqa: E402
from sources import read  # noqa: E402


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the program that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def rate(name: str, graphs, work=None) -> float:
    """Graphs a second, printed with what was in them."""
    seen, start = Counter(), time.perf_counter()
    for graph in graphs:
        good = isinstance(graph, RawGraph)
        seen.update(
            graphs=1,
            bad=not good,
            objects=good and len(graph.objects),
            relations=good and len(graph.relations),
        )
        if good and work:
            work(graph)
    seconds = time.perf_counter() - start
    counts = ", ".join(f"{n:,} {what}" for what, n in seen.items())
    print(
        f"{name:24} {seen['graphs'] / seconds:8,.0f} graphs/s  peak {peak_mb():5.0f} MB  {counts}", flush=True
    )
    return seen["graphs"] / seconds


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=56_000, help="graphs")
    n = parser.parse_args(argv).n
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        write_big_vg(folder, n)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{n:,} graphs, {size / 1e9:.2f} GB, written in {time.perf_counter() - start:.0f} s", flush=True
        )
        speed = rate("read", read(f"vg:{folder}"))
        rate("read and cleaned", read(f"vg:{folder}"), clean)
        (folder / "shuffled.json").replace(folder / "relationships.json")
        rate("read, orders differ", read(f"vg:{folder}"))
        print(f"targets: 2,000 graphs/s {'met' if speed >= 2000 else 'MISSED'}, "
              f"1,000 MB {'met' if peak_mb() < 1000 else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
