"""Pictures, however a row holds them: one upright RGB image everywhere, and nothing that could harm.

    record = as_record("photos/1.jpg", folder)      # or bytes, a data URL, base64, {"bytes", "path", "url"}
    image = to_rgb(open_image(record))

Orientation is applied once, here: trainer, vLLM, APIs and pages all see these pixels, and sizes and boxes are
in their frame.
"""

import base64
import binascii
import contextlib
import hashlib
import io
import json
import os
import stat
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from config import write_whole

# Formats that decode in this process: PIL would hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000")
STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"II*\0", b"MM\0*", b"BM")  # of most of them
MOST_PIXELS = 89_478_485  # above it PIL warns of a decompression bomb
MOST_BYTES = 64 * 2**20  # of a picture on the web
FETCH_S = 60  # for all of it, however slowly it comes
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---- records -----------------------------------------------------------------------------------------------
def as_record(value, base: Path, in_base64: bool = False):
    """A column's value with each image as {"bytes", "path"}, of which one is None; lists stay lists.

    Args: base: folder that relative paths start from; in_base64: text is the image itself. What is no image
        stays as it is, for `open_image` to refuse.
    """
    if isinstance(value, list):
        return [as_record(one, base, in_base64) for one in value]
    if isinstance(value, dict):
        keys = ("bytes", "path", "url", "image_url", "image")
        return as_record(next((value[key] for key in keys if value.get(key)), b""), base)
    if isinstance(value, str):
        if in_base64 or value.startswith("data:"):
            return {"bytes": from_base64(value.partition(",")[2] or value) or b"", "path": None}
        if (data := from_base64(value)) and data.startswith(STARTS):
            return {"bytes": data, "path": None}
        address = urllib.parse.urlsplit(value) if "://" in value else None
        if address and address.scheme == "file":
            value = urllib.request.url2pathname(address.path)
        return {"bytes": None, "path": value if is_url(value) else str(base / value)}
    return {"bytes": bytes(value), "path": None} if isinstance(value, (bytes, bytearray)) else value


def from_base64(text: str) -> bytes | None:
    """The bytes behind base64 in either alphabet, with or without line breaks; None where it is none."""
    try:
        return base64.b64decode("".join(text.split()).translate({45: 43, 95: 47}), validate=True)
    except (binascii.Error, ValueError):
        return None


def is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def read_bytes(encoded: dict) -> bytes:
    """The encoded picture of a record, fetched where it lies on the web. Raises: OSError."""
    if not isinstance(encoded, dict) or not (encoded.get("bytes") or encoded.get("path")):
        raise OSError(f"neither bytes nor a path: {str(encoded)[:80]}")
    if encoded.get("bytes"):
        return encoded["bytes"]
    if is_url(encoded["path"]):
        return fetch(encoded["path"])
    return Path(regular(encoded["path"])).read_bytes()


def regular(path: str) -> str:
    """The path of a file. Raises: OSError where it is a pipe or a device, which may never end."""
    try:
        wrong = "" if stat.S_ISREG(os.stat(path).st_mode) else "no regular file"
    except (OSError, ValueError) as error:  # not there, or a NUL in its name
        wrong = getattr(error, "strerror", None) or str(error)
    if wrong:
        raise OSError(f"{wrong}: {path[:200]!r}")
    return path


def fetch(url: str) -> bytes:
    """A picture on the web, kept in the user's cache: each epoch sees the same one. Raises: OSError."""
    kept = cache_folder() / "fetched" / digest(url.encode())
    if kept.exists():
        return kept.read_bytes()
    where = urllib.parse.urlsplit(url).hostname  # no more of it: a query may hold a key
    deadline, data = time.monotonic() + FETCH_S, bytearray()
    try:
        with urllib.request.urlopen(url, timeout=FETCH_S) as reply:
            while part := reply.read1(2**16):
                data += part
                if time.monotonic() > deadline or len(data) > MOST_BYTES:
                    raise OSError(f"more than {MOST_BYTES} bytes or {FETCH_S} s")
    except (OSError, ValueError, EOFError) as error:
        raise OSError(f"a picture on {where} cannot be fetched: {str(error)[:80]}") from None
    keep(kept, bytes(data))
    return bytes(data)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---- pictures ----------------------------------------------------------------------------------------------
def open_image(encoded: dict) -> Image.Image:
    """The upright PIL image behind a {"bytes", "path"} record. Raises: OSError, whatever is wrong with it.

    Only the header is read until pixels are asked for, unless it says that the image lies on its side.
    """
    with damage_named():
        path = encoded.get("path") if isinstance(encoded, dict) and not encoded.get("bytes") else None
        here = path and not is_url(path)
        image = Image.open(regular(path) if here else io.BytesIO(read_bytes(encoded)), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise OSError(f"{image.width} x {image.height}, more than {MOST_PIXELS} pixels")
        # A PNG without the tag in its header would be read to its end for one.
        tags = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        if tags.get(ExifTags.Base.Orientation) not in TURNS:
            return image
        image.load()  # which turns a TIFF, and takes its tag away
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def damage_named():
    """Whatever a damaged picture raises comes out as an OSError of one line."""
    try:
        yield
    except Exception as error:  # PIL has no end of kinds
        text = " ".join(str(error).split())[:200]
        raise OSError(text if isinstance(error, OSError) else f"{type(error).__name__}: {text}") from None


def check_pixels(data: bytes):
    """Decode a picture: its header says nothing of what was cut off. Raises: OSError."""
    with damage_named():
        image = open_image({"bytes": data})
        image.draft("RGB", (1, 1))  # of a JPEG an eighth of each side: all is read, little computed
        to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: on white where it is transparent, a depth map of more bits scaled to 8."""
    if image.mode.startswith(("I", "F")):  # PIL would cut them off
        depth = np.asarray(image, dtype=np.float64)
        known = depth[np.isfinite(depth)]
        near, far = (known.min(), known.max()) if known.size else (0, 0)
        shades = np.nan_to_num(255 * (depth - near) / ((far - near) or 1), nan=0, posinf=255, neginf=0)
        image = Image.fromarray(shades.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # tags that only some of the later readers would follow: turn me, these are my colours
    return image


# ---- the verdict on disk -----------------------------------------------------------------------------------
def cache_folder() -> Path:
    """SPATIALTHINKER_CACHE, or spatialthinker in the user's cache."""
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("SPATIALTHINKER_CACHE") or Path(users, "spatialthinker"))


def keep(path: Path, data: bytes):
    """Write a file of the cache whole; without room or rights for it, the next start works once more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as tmp:
            tmp.write_bytes(data)


class Passed:
    """Digests of the pictures of one source that decoded to their end: a second start need not decode them.

    Its own file for each source, written whole: several processes may start at the same time.
    """

    def __init__(self, name: str):
        # Another PIL may decode otherwise.
        self.path = cache_folder() / f"passed-{digest(f'{name} {Image.__version__}'.encode())}.json"
        self.new = set()
        try:
            self.old = set(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            self.old = set()

    def check(self, encoded: dict) -> str:
        """The picture's digest, once it has been decoded. Raises: OSError."""
        data = read_bytes(encoded)
        key = digest(data)
        if key not in self.old and key not in self.new:
            check_pixels(data)
            self.new.add(key)
        return key

    def save(self):
        if self.new:
            keep(self.path, json.dumps(sorted(self.old | self.new)).encode())
