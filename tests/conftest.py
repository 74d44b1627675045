"""What several test modules share: the untrained tiny model and a few drawn rows."""

import os
import tempfile
from pathlib import Path

import pytest

# torch's compiler keeps what it has compiled and does not ask for which instruction set: a process with
# another ATEN_CPU_CAPABILITY would get it as well, and wrong results from it (indices out of range, in vLLM's
# embedding).
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir()) / f"torchinductor-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

kept = tempfile.TemporaryDirectory(prefix="spatialthinker-")  # nothing in the user's own cache
os.environ["SPATIALTHINKER_CACHE"] = kept.name


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of an untrained tiny Qwen2.5-VL with its processor."""
    from tiny import build_base_model

    folder = tmp_path_factory.mktemp("tiny") / "base_model"
    build_base_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def family(tiny_base, tmp_path_factory):
    """family(model type, tied): folder of an untrained model of that type, made once."""
    from functools import cache

    from models import build_tiny

    @cache
    def folder(model_type: str, tied: bool = True):
        path = tmp_path_factory.mktemp(model_type)
        build_tiny(path, model_type, tiny_base, tied)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder with train.parquet (32 rows) and val.parquet (24 rows) of the drawn set."""
    from stvqa import write_parquet
    from tiny import rows

    folder, taken = tmp_path_factory.mktemp("tiny_data"), set()
    for name, n in (("val", 24), ("train", 32)):
        write_parquet(folder / f"{name}.parquet", rows(n, 0, name, taken))
    return folder


@pytest.fixture(scope="session")
def tiny_start():
    """Folder of the start on the drawn set: it answers in the trained format."""
    return Path(__file__).parents[1] / "assets" / "tiny"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folder with a few rows of every benchmark."""
    import fixtures

    path = tmp_path_factory.mktemp("benchmarks")
    fixtures.write_all(path)
    return path
