"""Small pictures, made."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int | None = None) -> dict:
    """An encoded picture of coloured noise, its own for every size or seed."""
    rng = np.random.default_rng(width if seed is None else seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def bomb(width, height):
    """A PNG that claims so many pixels and has none."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
