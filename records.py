"""Annotation files, a record at a time in bounded memory, and what may be read off a record.

A file of ten gigabytes is read as a stream. A record that is not as expected raises `Bad`, which names the
field.
"""

import codecs
import csv
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from images import open_image
from scenes import Box

# Pictures are looked for in the folder given, in these below it, and in these below its folder images.
SUBFOLDERS = ("VG_100K", "VG_100K_2", "train2017", "val2017", "train", "validation", "test")
LONGEST = 1 << 28  # characters of one record: all that must fit into memory
FAR = 1e7  # pixels: no image is that large


class Bad(ValueError):
    """What is wrong with the record at hand."""


# ---- parts of records --------------------------------------------------------------------------------------
def shown(value) -> str:
    return repr(value)[:100]


WORDS = {int: "a whole number", str: "a text", list: "a list", dict: "a record", object: "a value"}


def get(record, key, kind: type | tuple = object, default=None):
    """The record's value under a key, which must be of the kind; a default makes it optional. Raises: Bad."""
    if not isinstance(record, dict):
        raise Bad(f"expected a record with {key}, got {shown(record)}")
    value = record.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or value is None or isinstance(value, bool):
        kinds = " or ".join(WORDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise Bad(f"{key}: expected {kinds}, got {shown(value) if key in record else 'nothing'}")
    return value


def id_of(record, *keys: str) -> str:
    """The first of the keys that the record has, a number or a text, as text. Raises: Bad."""
    for key in keys:
        if isinstance(record, dict) and record.get(key) is not None:
            return str(get(record, key, (int, str)))
    raise Bad(f"expected {' or '.join(keys)}, got {shown(record)}")


def texts(value, what: str) -> tuple[str, ...]:
    """A list of texts as a tuple; nothing is the empty one. Raises: Bad."""
    if value is None:
        return ()
    if type(value) is list and set(map(type, value)) <= {str}:
        return tuple(value)
    raise Bad(f"{what}: expected texts, got {shown(value)}")


def corners(x, y, w, h, record) -> Box:
    """x1, y1, x2, y2 of a box given by corner and size. Raises: Bad; a size of 0 is left to scenes.clean."""
    try:
        if 0 <= w < FAR and 0 <= h < FAR and -FAR < x < FAR and -FAR < y < FAR:  # NaN is none of these
            return (x + 0.0, y + 0.0, x + w + 0.0, y + h + 0.0)
    except TypeError:
        pass
    raise Bad(f"box: expected numbers x, y, width >= 0, height >= 0, got {shown(record)}")


def xyxy(value) -> Box:
    """A box given by its corners. Raises: Bad."""
    if isinstance(value, (list, tuple)) and len(value) == 4:
        x1, y1, x2, y2 = value
        try:
            if -FAR < x1 <= x2 < FAR and -FAR < y1 <= y2 < FAR:
                return (x1 + 0.0, y1 + 0.0, x2 + 0.0, y2 + 0.0)
        except TypeError:
            pass
    raise Bad(f"box: expected [x1, y1, x2, y2], numbers with x1 <= x2 and y1 <= y2, got {shown(value)}")


def stated_size(record) -> tuple[int, int]:
    """(width, height) of a record that has them. Raises: Bad."""
    size = get(record, "width", int), get(record, "height", int)
    if not (0 < size[0] < FAR and 0 < size[1] < FAR):
        raise Bad(f"expected a width and a height of at least 1, got {size[0]} x {size[1]}")
    return size


class Pictures:
    """Where the pictures are, and how large."""

    def __init__(self, folder: str | None):
        self.folders = []
        if folder:
            above = folder, os.path.join(folder, "images")
            below = [os.path.join(parent, name) for parent in above for name in SUBFOLDERS]
            self.folders = [folder, *filter(os.path.isdir, (above[1], *below))]

    def place(self, name: str, stated: tuple[int, int] | None) -> tuple[str, int, int]:
        """(path, width, height) of a picture. Args: stated: its size as the annotators saw it, if known.

        The file's size, upright, is the size where there is a file. Raises: Bad where that is not the one
        stated, as the boxes are then of another picture, or where none is known.
        """
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/"):  # the annotations' author does not choose the folder
            name = parts[-1]
        tries = [os.path.join(folder, n) for n in dict.fromkeys((name, os.path.basename(name)))
                 for folder in self.folders]  # fmt: skip
        path = next(filter(os.path.isfile, tries), None)
        if path is None:
            if stated is None:
                where = tries[0] if tries else f"{name}, but no folder of images is given"
                raise Bad(f"expected a picture, for its size: {where}")
            return (tries[0] if tries else name), *stated
        try:
            size = open_image({"path": path}).size
        except OSError as error:
            raise Bad(f"expected a readable picture, got {path}: {error}") from None
        if stated and size != stated:
            raise Bad(f"expected a picture of {stated[0]} x {stated[1]}, got {size[0]} x {size[1]}: {path}")
        return path, *size


# ---- files, a record at a time -----------------------------------------------------------------------------
def open_file(path: str | Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


class JsonFile:
    """A JSON file of any size, of which only a piece is in memory: `text`, read up to `at`.

    `marked` and `bytes` are the same place twice, in the text and in the file, somewhere before `at`.
    """

    blanks = re.compile(r"[ \t\r\n]*")
    decode = staticmethod(json.JSONDecoder().raw_decode)
    near = 16  # characters: what is cut off within so many of the end, a word or a number, looks mistaken

    def __init__(self, path: str | Path):
        self.path, self.file = path, open_file(path)
        self.seek(3 if self.file.read(3) == codecs.BOM_UTF8 else 0)

    def seek(self, offset: int):
        self.file.seek(offset)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.marked, self.bytes = "", 0, 0, offset
        self.ended, self.piece, self.fault = False, 1 << 15, None

    def byte(self) -> int:
        """How many bytes into the file `at` is."""
        self.bytes += len(self.text[self.marked : self.at].encode())
        self.marked = self.at
        return self.bytes

    def error(self, message: str) -> ValueError:
        """What is wrong at `at`."""
        last = self.ended and self.at >= len(self.text) - self.near
        if last and self.fault:
            return ValueError(self.fault)
        cut = f" (the file ends at byte {self.file.tell()}: cut off?)" if last else ""
        return ValueError(f"{self.path}: byte {self.byte()}: {message}{cut}")

    def fill(self) -> bool:
        """Read on; whether there was more."""
        if self.ended:
            return False
        self.byte()
        rest = self.text[self.at :]
        self.piece = min(self.piece * 2, 1 << 20)
        data = self.file.read(max(self.piece, len(rest)))  # twice as much: a long record is not decoded often
        try:
            new = self.decoder.decode(data, final=not data)
            self.ended = not data
        except UnicodeDecodeError as error:  # what stands before it can be read
            new, self.ended = error.object[: error.start].decode(), True
            byte = self.file.tell() - len(error.object) + error.start
            bad = error.object[error.start : error.end]
            self.fault = f"{self.path}: byte {byte}: expected UTF-8, got {bad}"
        self.text, self.at, self.marked = rest + new, 0, 0
        return True

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            self.at = self.blanks.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def take(self, expected: str) -> str:
        """Step over the next character, which must be one of those expected."""
        got = self.peek()
        if not got or got not in expected:
            raise self.error(f"expected {' or '.join(expected)}, got {got or 'nothing'}")
        self.at += 1
        return got

    def value(self):
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                # A bracket or quote closes a value; a number could go on in the next piece.
                if self.text[end - 1] in '}]"' or end < len(self.text) - self.near or self.ended:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                # Within the text it is a mistake; at its end, or in an open string, the end of a piece.
                open_string = error.msg.startswith("Unterminated")
                cut = open_string or error.pos >= len(self.text) - self.near
                if self.ended or not cut:
                    self.at = len(self.text) if open_string else error.pos
                    raise self.error(f"not JSON: {error.msg.removesuffix(' starting at')}") from None
                if len(self.text) - self.at > LONGEST:
                    raise self.error(f"expected a record of at most {LONGEST:,} characters") from None
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
                raise self.error(f"not a record: {error}") from None
            self.fill()

    def items(self) -> Iterator[tuple[int, object]]:
        """(byte, value) of each value in the list that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            self.peek()
            yield self.byte(), self.value()
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """Each key of the object that comes next; the caller reads its value before asking for another."""
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self.error(f"expected a key in quotes, got {self.peek() or 'nothing'}")
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def skip(self):
        """Step over the next value, a list one item at a time."""
        if self.peek() == "[":
            for _ in self.items():
                pass
        else:
            self.value()

    def finish(self):
        if (got := self.peek()) or self.fault:
            raise self.error(f"expected the end of the file, got {got}")


class ByImage:
    """Records of a file that lists images, asked for by image id.

    As long as they are asked for in the file's order it is read through; at the first one out of turn, once
    from end to end, to learn where each record begins.
    """

    def __init__(self, path: Path):
        self.file = JsonFile(path)
        self.records, self.starts, self.broken = self.file.items(), None, None

    def get(self, image_id: str):
        """The image's record, or None. Raises: ValueError where the file is broken."""
        if self.starts is None:
            _, record = next(self.records, (0, None))
            if record is not None and image_of(record) == image_id:
                return record
            self.starts = {}
            try:
                for byte, record in JsonFile(self.file.path).items():
                    self.starts.setdefault(image_of(record), byte)
            except ValueError as error:
                self.broken = error
        if image_id in self.starts:
            self.file.seek(self.starts[image_id])
            return self.file.value()
        if self.broken:
            raise self.broken
        return None


def image_of(record) -> str | None:
    """The id of a record's image; None where it has none that can be read."""
    try:
        return id_of(record, "image_id", "id")
    except Bad:
        return None


# ---- CSV ----
class CsvByImage:
    """Rows of a CSV by image, wherever they stand in it: 24 bytes for each run of rows are held."""

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.file = path, open_file(path)
        head = self.file.readline()
        self.header = head.decode("utf-8-sig", "replace").strip().split(",")
        if missing := [column for column in columns if column not in self.header]:
            raise ValueError(f"{path}: expected in the first line {','.join(columns)}, missing {missing}")
        self.column, at, last = self.header.index("ImageID"), len(head), None
        hashes, starts = array("q"), array("q")
        for line in self.file:
            image = self.image(line)
            if image != last:
                hashes.append(hash(image))
                starts.append(at)
                last = image
            at += len(line)
        self.starts = np.array([*starts, at])
        self.hashes = np.array(hashes, dtype=np.int64)
        self.order = np.argsort(self.hashes, kind="stable")
        self.sorted = self.hashes[self.order]

    def image(self, line: bytes) -> bytes:
        fields = line.split(b",", self.column + 1)
        return fields[self.column].strip() if len(fields) > self.column else b""

    def images(self) -> Iterator[str]:
        """Each image once, in the order in which they appear."""
        for run in np.sort(np.unique(self.hashes, return_index=True)[1]):
            self.file.seek(self.starts[run])
            if image := self.image(self.file.readline()):
                yield image.decode("utf-8", "replace")

    def run(self, run: int) -> list[dict]:
        self.file.seek(self.starts[run])
        data = self.file.read(int(self.starts[run + 1] - self.starts[run]))
        lines = data.decode("utf-8", "replace").splitlines()
        try:
            return [dict(zip(self.header, row, strict=False)) for row in csv.reader(lines)]
        except csv.Error as error:
            raise Bad(f"{self.path}: not CSV: {error}") from None

    def rows(self, image_id: str) -> list[dict]:
        wanted = hash(image_id.encode())
        first, last = np.searchsorted(self.sorted, wanted), np.searchsorted(self.sorted, wanted, "right")
        found = [row for run in self.order[first:last] for row in self.run(run)]
        return [row for row in found if row.get("ImageID") == image_id]
