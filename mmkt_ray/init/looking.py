"""A look at somebody's data: which reader reads it, and its columns in the first rows."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmkt_ray.errors import DataError
from mmkt_ray.init.classify import AUDIO_SUFFIXES, IMAGE_SUFFIXES, Look
from mmkt_ray.kinds.cells import is_nan, likely_encoding
from mmkt_ray.kinds.content import what_else
from mmkt_ray.samples.columns import MAX_ROW_BYTES
from mmkt_ray.samples.json_rows import Fault, parse_row
from mmkt_ray.samples.lines import other_separator, read_header, separator_error
from mmkt_ray.samples.shards import visible

LOOK_ROWS = 10_000
LOOK_MEMBERS = 2_000  # of an archive
TABLES = (".csv", ".jsonl", ".parquet")
TEXT_SUFFIXES = (".txt", ".text", ".md", "")


@dataclass(frozen=True)
class Seen:
    """What was found: the source's reader, place and columns."""

    reader: str
    root: str  # absolute folder: data_root
    path: str  # below it
    looks: list[Look]
    encoding: str = "utf-8"
    theirs: Mapping[str, str] | None = None  # our column -> the source's, where the layout fixes them


def look_at(path: str) -> Seen:
    """A table, a folder of tables or of class folders, or a tar. Raises: DataError for anything else."""
    place = Path(path).expanduser().absolute()
    if not place.exists():
        raise DataError(f"nothing at '{path}': name a CSV, JSONL or Parquet file, a folder, or a .tar")
    if place.is_dir():
        return _look_at_folder(place)
    name = place.name.lower()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return _look_at_tar(place)
    if not name.endswith(TABLES):
        raise DataError(
            f"'{path}' is no CSV, JSONL, Parquet or .tar file: convert it, e.g. by pandas: df.to_csv('data.csv', "
            "index=False)"
        )
    return _look_at_table(place, place.name)


def _look_at_folder(place: Path) -> Seen:
    files = sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith("."))
    for suffix in TABLES:
        if tables := [p for p in files if p.name.lower().endswith(suffix)]:
            return _look_at_table(tables[0], f"*{tables[0].suffix}" if len(tables) > 1 else tables[0].name)
    if archives := [p for p in files if p.name.lower().endswith(".tar")]:
        found = _look_at_tar(archives[0])
        return Seen(
            found.reader, found.root, "*.tar" if len(archives) > 1 else found.path, found.looks, theirs=found.theirs
        )
    names = [str(p.relative_to(place)) for p in islice(sorted(place.rglob("*")), LOOK_MEMBERS) if p.is_file()]
    return _class_folders(place.parent, place.name, names)


# --- class folders and archives --------------------


def _class_folders(root: Path, path: str, names: Iterable[str]) -> Seen:
    """A folder per class, with files of images, sounds or texts in it. Raises: DataError if there are none."""
    names = [name for name in names if not Path(name).name.startswith(".")]
    labels = [Path(name).parent.name for name in names]
    suffixes = [Path(name).suffix.lower() for name in names]
    for kind, known in (("image", IMAGE_SUFFIXES), ("audio", AUDIO_SUFFIXES), ("text", TEXT_SUFFIXES)):
        if names and sum(s in known for s in suffixes) > len(names) / 2:
            looks = [
                Look(
                    kind,
                    [f"x{s}" for s in suffixes] if kind != "text" else ["a text of a file"] * len(names),
                    len(names),
                ),
                Look("label", [label for label in labels if label], len(labels)),
            ]
            return Seen("folders", str(root), path, looks, theirs={kind: "content", "label": "folder"})
    raise DataError(
        f"'{root / path}' holds no table, no .tar and no class folders of images, sounds or texts: {names[:5]}"
    )


def _look_at_tar(place: Path) -> Seen:
    """A WebDataset, whose members of one sample share a name, else class folders in an archive."""
    try:
        with tarfile.open(place) as tar:
            members = [m for m in islice(tar, LOOK_MEMBERS) if m.isfile() and visible(m.name)]
            groups: dict[str, dict[str, Any]] = {}
            for member in members:
                base = member.name.rpartition("/")[2]
                stem, _, suffix = base.partition(".")
                key = member.name.removesuffix(base) + stem
                file = tar.extractfile(member)
                groups.setdefault(key, {})[suffix.lower()] = file.read(4096) if file else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"'{place}' is no readable tar: {error}") from None
    if members and len(groups) < 0.9 * len(members):
        return _webdataset(place, list(groups.values()))
    return _class_folders(place.parent, place.name, [m.name for m in members])


def _webdataset(place: Path, samples: list[dict[str, Any]]) -> Seen:
    looks, theirs = [], {}
    suffixes = list(dict.fromkeys(s for sample in samples for s in sample))
    images = [s for s in suffixes if f".{s}" in IMAGE_SUFFIXES]
    for name, chosen in (("image", images), ("audio", [s for s in suffixes if f".{s}" in AUDIO_SUFFIXES])):
        if chosen:
            looks.append(Look(name, [sample[s] for sample in samples for s in chosen if s in sample], len(samples)))
            theirs[name] = ",".join(chosen)
    for suffix in suffixes:
        values = [sample[suffix] for sample in samples if suffix in sample]
        if suffix == "json":
            for key, cells in _columns_of([_json(value) for value in values]).items():
                looks.append(Look(key, cells, len(samples)))
                theirs[key] = f"json.{key}"
        elif suffix in ("txt", "text", "caption", "cls"):
            looks.append(Look(suffix, [value.decode("utf-8", "replace").strip() for value in values], len(samples)))
            theirs[suffix] = suffix
    return Seen("webdataset", str(place.parent), place.name, looks, theirs=theirs)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:  # cut by the look, or no JSON
        return {}


# --- tables --------------------


def _look_at_table(file: Path, path: str) -> Seen:
    suffix, encoding = file.suffix.lower(), "utf-8"
    if suffix == ".parquet":
        columns, num_rows = _parquet_rows(file)
    else:
        encoding = _encoding(file)
        header, rows = _csv_rows(file, encoding) if suffix == ".csv" else ([], _json_rows(file, encoding))
        columns, num_rows = {name: list[Any]() for name in header} | _columns_of(rows), len(rows)
    if not num_rows:
        raise DataError(f"'{file}' has no rows")
    looks = []
    for name, values in columns.items():
        theirs = name
        if values and all(isinstance(v, dict) and "bytes" in v for v in values):  # as Hugging Face's data sets have it
            theirs, values = f"{name}.bytes", [v["bytes"] for v in values if v["bytes"] is not None]
        looks.append(Look(name, values, num_rows, theirs, str(file.parent)))
    holds_bytes = any(isinstance(value, bytes) for look in looks for value in look.values[:1])
    reader = "parquet" if suffix == ".parquet" and holds_bytes else "manifest"
    return Seen(reader, str(file.parent), path, looks, encoding)


def _columns_of(rows: Iterable[Any]) -> dict[str, list[Any]]:
    """Column -> its values, absent ones left out."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            cells = columns.setdefault(name, [])
            if value is not None and value != "" and not is_nan(value):
                cells.append(value)
    return columns


def _parquet_rows(file: Path) -> tuple[dict[str, list[Any]], int]:
    try:
        with pq.ParquetFile(file) as opened:
            batch = next(opened.iter_batches(1000), None)
            num_rows = 0 if batch is None else batch.num_rows
            names = opened.schema_arrow.names
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' is no readable Parquet file: {error}") from None
    return {name: list[Any]() for name in names} | _columns_of([] if batch is None else batch.to_pylist()), num_rows


def _encoding(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(1 << 20)
    if other := what_else(start):
        raise DataError(f"'{file}' is no table: it is {other}")
    if guess := likely_encoding(start[:400]):
        return guess
    try:
        start[: start.rfind(b"\n") + 1 or None].decode()
        return "utf-8"
    except UnicodeDecodeError:
        return "cp1252"


def _csv_rows(file: Path, encoding: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The header and the first rows; a column without a name, such as the index of pandas, is called ""."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with file.open(encoding=encoding.replace("utf-8", "utf-8-sig"), errors="replace", newline="") as stream:
        table = csv.reader(stream)
        try:
            header = read_header(table)
            if mark := other_separator(header):
                raise separator_error(str(file), mark)
            rows = [dict(zip(header, cells, strict=False)) for cells in islice(table, LOOK_ROWS)]
        except csv.Error as error:
            raise DataError(f"'{file}', line {table.line_num}: {error}") from None
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"'{file}': each column needs a name of its own, {twice} are there more than once")
    return header, rows


def _json_rows(file: Path, encoding: str) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding=encoding, errors="replace") as stream:
        for number, line in enumerate(islice(stream, LOOK_ROWS), start=1):
            if line.strip():
                row = parse_row(line, [])
                if isinstance(row, Fault):
                    raise DataError(f"'{file}', line {number}: {row.reason}")
                rows.append(row)
    return rows


def default_name(place: str) -> str:
    """The run's name: that of the file or folder, as far as a name may have its characters."""
    stem = os.path.basename(os.path.abspath(os.path.expanduser(place))).split(".")[0]
    return clean_name(stem) or "run"


def clean_name(text: str) -> str:
    """Letters, digits and '_' of a text, beginning with a letter or digit."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text.strip()).strip("_")
