"""Small pictures, made."""

import io

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int | None = None) -> dict:
    """An encoded picture of coloured noise, its own for every size or seed."""
    rng = np.random.default_rng(width if seed is None else seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}
