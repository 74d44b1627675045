"""Tables of rows: a Hub data set, parquet, JSONL, TSV or a `save_to_disk` folder, read a row at a time.

    table = read_table("data/stvqa", "train", None, ["images"])
    len(table), table.column_names, table[0]["images"]      # {"bytes": ..., "path": ...}, still encoded

A split of a folder is SPLIT.parquet or its shards, SPLIT-00000-of-00003.parquet: all, and nothing else.
"""

import functools
import json
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

from images import as_record


class Table(Sequence):
    """Rows as dicts whose images are the records that `images.open_image` takes."""

    def __init__(self, rows, image_columns: Sequence[str], base: Path, in_base64: bool):
        self.rows, self.column_names = rows, rows.column_names
        self.image_columns, self.base, self.in_base64 = image_columns, base, in_base64

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = dict(self.rows[i])
        for name in self.image_columns:
            if row.get(name) is not None:
                row[name] = as_record(row[name], self.base, self.in_base64)
        return row

    def column(self, name: str):
        """All values of a column, without reading the images beside them."""
        return [row.get(name) for row in self.rows] if isinstance(self.rows, JsonRows) else self.rows[name]


class JsonRows(Sequence):
    """Records of a .jsonl file, or of a list in a .json file, each parsed when it is asked for.

    A broken record raises ValueError with file and line when it is asked for, and no sooner: it is one row.
    """

    def __init__(self, path: Path):
        self.path, self.spans = path, []  # (line, its start, its end)
        if not path.stat().st_size:
            raise ValueError(f"{path}: no rows")
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            start = 0
            for number, line in enumerate(file, 1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self.spans.append((number, start, start + len(line)))
                start += len(line)
        self.listed = self.whole() if path.suffix == ".json" else None
        names = {}
        for i in range(len(self)):
            try:
                names |= dict.fromkeys(self[i])
            except ValueError:  # a row that cannot be used, which its reader will find
                continue
        self.column_names = list(names)

    def whole(self) -> list | None:
        """The list that the whole file is; None where it has a record a line."""
        try:
            value = json.loads(self.data[:].decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, list) else None

    def __len__(self):
        return len(self.spans if self.listed is None else self.listed)

    def __getitem__(self, i: int) -> dict:
        if self.listed is not None:
            record, where = self.listed[i], f"{self.path}, record {i}"
        else:
            number, start, end = self.spans[i]
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(self.data[start:end].decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected JSON, got {str(error)[:100]}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, got {str(record)[:60]!r}")
        return record


def read_table(
    source: str, split: str, revision: str | None, image_columns: Sequence[str], config: str | None = None
) -> Table:
    """The rows, on disk until they are asked for, with their images left encoded.

    Args: source: Hub id (with `config`), .parquet, .jsonl or .tsv file (images in base64), or folder. Paths
        in its rows start from the folder of the file.
    Raises: ValueError naming the source, with what was expected and found.
    """
    import datasets
    import pyarrow

    if not source:
        raise ValueError("data: expected a Hub id, a file or a folder, got nothing")
    path = Path(source)
    try:
        rows, base = open_rows(path, source, split, revision, config)
    except StopIteration:  # of an empty file
        raise ValueError(f"{source}: no rows") from None
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:  # the cause says what failed
        raise ValueError(f"{source}: {error.__cause__ or error}") from None
    for name, feature in (getattr(rows, "features", None) or {}).items():
        # Decoded, every row that is looked at would cost its pixels, though most checks need the header only.
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return Table(rows, image_columns, base, path.suffix == ".tsv")


def open_rows(path: Path, source: str, split: str, revision: str | None, config: str | None):
    """(rows as `datasets` or JsonRows reads them, folder that their paths start from)."""
    import datasets

    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        table = datasets.load_from_disk(source)
        if not isinstance(table, datasets.DatasetDict):  # one split was saved by itself
            return table, path
        if split not in table:
            raise ValueError(f"{source}: expected split {split!r}, got {list(table)}")
        return table[split], path
    if path.is_dir():
        # "a+b" is how the Hub names the union of two splits.
        files = [file for part in split.split("+") for file in shards(path, part)]
        return datasets.Dataset.from_parquet([str(f) for f in files]), files[0].parent
    if path.suffix in (".parquet", ".jsonl", ".json", ".tsv"):
        if not path.is_file():
            raise ValueError(f"{source}: {'expected a regular file' if path.exists() else 'no such file'}")
        # Without keep_default_na=False an option "None" or "NA" would be read as nothing.
        read_tsv = functools.partial(datasets.Dataset.from_csv, sep="\t", keep_default_na=False)
        readers = {".parquet": datasets.Dataset.from_parquet, ".tsv": read_tsv}
        rows = readers[path.suffix](source) if path.suffix in readers else JsonRows(path)
        return rows, path.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
        return datasets.load_dataset(source, config, split=split, revision=revision), path
    raise ValueError(
        f"{source}: expected a Hub id, a .parquet, .jsonl or .tsv file, or a folder; found none of these"
    )


def shards(folder: Path, split: str) -> list[Path]:
    """SPLIT.parquet, or SPLIT-N.parquet or SPLIT-N-of-M.parquet in order, of a folder or its data/.

    Raises: ValueError where some of the M are missing, or several sets lie there.
    """
    named = re.compile(rf"{re.escape(split)}(?:-(\d+))?(?:-of-(\d+))?(-[0-9a-f]{{16}})?\.parquet")
    # Not at any depth: below a folder of benchmarks lie other data sets with the same split names.
    for place in (folder, folder / "data"):
        found = [(named.fullmatch(p.name), p) for p in sorted(place.glob("*.parquet")) if p.is_file()]
        found = sorted((int(m[1] or 0), m[1] is None, m[2], p) for m, p in found if m)
        if not found:
            continue
        numbers, names = [n for n, *_ in found], [p.name for *_, p in found]
        if len({(alone, of) for _, alone, of, _ in found}) > 1 or len(set(numbers)) < len(numbers):
            raise ValueError(f"{place}: expected one set of files for split {split!r}, got {names[:9]}")
        of = int(found[0][2] or len(found))
        if len(found) != of:
            missing = sorted(set(range(of)) - set(numbers))[:9]
            raise ValueError(f"{place}: expected {of} shards of split {split!r}, missing {missing}")
        return [p for *_, p in found]
    held = sorted(p.name for p in folder.iterdir())[:20]
    raise ValueError(
        f"{folder}: expected {split}.parquet or {split}-*-of-*.parquet in the folder, got {held}"
    )
