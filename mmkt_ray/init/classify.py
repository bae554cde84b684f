"""What a column of somebody's table is, by its name and a sample of its values;
the first rule that fits decides.

A kind that a config can use as a modality, a task, an id or a split is in KINDS with what it becomes there; `unused`
ones are named and left out.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from mmkt_ray.errors import DataError
from mmkt_ray.kinds.cells import is_nan, read_list
from mmkt_ray.kinds.vectors import vector_of
from mmkt_ray.samples.splits import normalise_split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
MAGIC = {  # the first bytes of a file -> what it is
    b"\xff\xd8\xff": "image",
    b"\x89PNG": "image",
    b"GIF8": "image",
    b"BM": "image",
    b"II*\x00": "image",
    b"MM\x00*": "image",
    b"fLaC": "audio",
    b"OggS": "audio",
    b"ID3": "audio",
    b"FORM": "audio",
}
SPLIT_NAMES = {"split", "fold", "set", "subset", "partition"}
ID_NAMES = {"id", "sample_id", "uid", "uuid", "guid", "key", "sku", "code", "index", "nr", "number"}
MAX_CLASSES = 1000
MAX_NUMBERS = 2  # distinct whole numbers that are classes without asking: 0 and 1
LONG_TEXT_WORDS = 3.0  # on average, from which on a column is text, however often values come again
FREE_TEXT_SHARE = 0.5  # of distinct values, from which on short ones are names or titles


@dataclass(frozen=True)
class Look:
    """A column as it was seen: its values in a sample of the rows, without those that are absent."""

    name: str
    values: Sequence[Any]
    num_rows: int  # of the sample
    theirs: str = ""  # what a source calls it, where that is not its name: the bytes in a struct
    folder: str = ""  # where paths in it begin, if it comes from a file

    @property
    def texts(self) -> list[str]:
        """The values that are text."""
        return [value for value in self.values if isinstance(value, str)]

    @property
    def distinct(self) -> int:
        """How many different values."""
        return len({str(value) for value in self.values})


@dataclass(frozen=True)
class ClassifiedColumn:
    """What a column was taken for, and why."""

    look: Look
    kind: str  # a key of KINDS
    why: str

    @property
    def name(self) -> str:
        return self.look.name


Rule = Callable[[Look], str | None]  # why a column is of a kind, None if it is not


def _is_image(look: Look) -> str | None:
    return _is_file(look, "image", IMAGE_SUFFIXES)


def _is_audio(look: Look) -> str | None:
    return _is_file(look, "audio", AUDIO_SUFFIXES)


def _is_file(look: Look, kind: str, suffixes: tuple[str, ...]) -> str | None:
    data = [value for value in look.values if isinstance(value, bytes)]
    if data and len(data) == len(look.values):
        count = sum(file_kind(value) == kind for value in data)
        return f"bytes that begin as {kind} files do" if 2 * count > len(data) else None
    texts = look.texts
    if not texts or sum(text.lower().endswith(suffixes) for text in texts) < 0.8 * len(texts):
        return None
    if not look.folder:
        return f"paths of {kind} files"
    there = sum(os.path.isfile(os.path.join(look.folder, text)) for text in texts)
    where = "" if there == len(texts) else f"; relative ones begin at '{look.folder}'"
    return f"paths of {kind} files, {there} of {len(texts)} are there{where}"


def file_kind(data: bytes) -> str | None:
    """image or audio by a file's first bytes; None for anything else."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "image", b"WAVE": "audio"}.get(data[8:12])
    return next((kind for start, kind in MAGIC.items() if data.startswith(start)), None)


def _is_split(look: Look) -> str | None:
    if look.name.lower() not in SPLIT_NAMES or not look.values:
        return None
    try:
        found = Counter(normalise_split(str(value)) for value in look.values)
    except ValueError:
        return None
    return f"its name, and its values are {', '.join(found)}"


def _is_id(look: Look) -> str | None:
    name = look.name.lower()
    named = name in ID_NAMES or name.endswith(("_id", "-id", " id")) or re.search(r"[a-z]I[dD]$", look.name)
    whole = all(isinstance(v, int | str) and not isinstance(v, bool) for v in look.values)
    if not named or not whole or look.distinct < len(look.values) or len(look.values) < look.num_rows:
        return None
    return f"its name, and the {look.num_rows:,} values that were read are all different"


def _is_number(look: Look) -> str | None:
    numbers = as_numbers(look.values)
    if numbers is None:
        return None
    return f"numbers from {min(numbers):g} to {max(numbers):g}"


def as_numbers(values: Sequence[Any]) -> list[float] | None:
    """The values as numbers, also of texts that are such; None if any is something else, or there are none."""
    found = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            found.append(float(value))
        except ValueError:
            return None
    return found or None


_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([T ]\d\d?:\d\d.*)?|\d\d?[./]\d\d?[./]\d{2,4}")


def _is_date(look: Look) -> str | None:
    if look.values and all(isinstance(v, date) or (isinstance(v, str) and _DATE.fullmatch(v)) for v in look.values):
        return "dates"
    return None


def _is_vector(look: Look) -> str | None:
    if any(isinstance(value, dict) for value in look.values):
        return None
    try:
        lengths = {len(vector) for value in look.values if (vector := vector_of(value)) is not None}
    except ValueError:
        return None
    return f"lists of {lengths.pop()} numbers" if len(lengths) == 1 else None


def _is_text(look: Look) -> str | None:
    texts = look.texts
    if not texts or len(texts) < len(look.values):
        return None
    words, share = sum(len(text.split()) for text in texts) / len(texts), look.distinct / len(texts)
    if words >= LONG_TEXT_WORDS:
        return f"texts of {words:.0f} words on average"
    if share > FREE_TEXT_SHARE:
        return f"short texts, {look.distinct:,} of {len(texts):,} different"
    return None


def _is_category(look: Look) -> str | None:
    if look.values and all(isinstance(value, str | bool) for value in look.values):
        return f"{look.distinct:,} different values"
    return None


@dataclass(frozen=True)
class Kind:
    """One kind of column: the rule that finds it, and what it becomes."""

    rule: Rule
    role: str  # modality, cell (of the one table), sample_id, split, or unused
    encoder: str = ""  # of a modality, as YAML
    note: str = ""  # why it is not used, or what else could be


KINDS: dict[str, Kind] = {  # in the order in which they are tried
    "image": Kind(_is_image, "modality", "pixels"),
    "audio": Kind(_is_audio, "modality", "{name: logmel_cnn, pretrain: TASK}"),
    "split": Kind(_is_split, "split"),
    "id": Kind(_is_id, "sample_id"),
    "number": Kind(_is_number, "cell"),
    "date": Kind(_is_date, "cell"),
    "vector": Kind(_is_vector, "modality", "identity"),
    "text": Kind(_is_text, "modality", "tfidf"),
    "category": Kind(_is_category, "cell", note="to predict it: --target"),
    "other": Kind(lambda look: "values of a kind that nothing here reads", "unused", note="not used"),
}


def classify(look: Look) -> ClassifiedColumn:
    """What a column is, the target aside. A column without values, or without a name, is `other`."""
    if look.name == "":
        return ClassifiedColumn(look, "other", "it has no name; an index of pandas, as a rule")
    if not look.values:
        return ClassifiedColumn(look, "other", f"no value in the first {look.num_rows:,} rows")
    for name, kind in KINDS.items():
        if why := kind.rule(look):
            return ClassifiedColumn(look, name, why)
    raise AssertionError("the last kind takes everything")


def classify_all(looks: Sequence[Look], given: Mapping[str, str] | None = None) -> list[ClassifiedColumn]:
    """All columns; of several ids and splits the first one counts. given: column -> kind, where the user says so."""
    found, taken = [], set()
    for look in looks:
        said = given.get(look.name) if given else None
        column = ClassifiedColumn(look, said, "as you say") if said is not None else classify(look)
        role = KINDS[column.kind].role
        if role in ("sample_id", "split") and role in taken:
            column = ClassifiedColumn(look, "other", f"{column.why}, but another column is the {column.kind} already")
        taken.add(role)
        found.append(column)
    return found


@dataclass(frozen=True)
class Target:
    """What to predict: the kind of a task."""

    look: Look
    kind: str  # multiclass, binary, multilabel or regression
    why: str
    separator: str = "|"


def classify_target(look: Look, as_classes: bool = False) -> Target:
    """The task that a column is. Raises: DataError for what is most likely no set of classes."""
    values = [value for value in look.values if not is_nan(value)]
    if not values:
        raise DataError(
            f"the target '{look.name}' has no value in the first {look.num_rows:,} rows: name another column"
        )
    lists = [found for value in values if (found := _as_list(value)) is not None]
    if 2 * len(lists) > len(values):
        names = {str(name) for found in lists for name in found}
        return Target(look, "multilabel", f"lists of {len(names):,} different classes")
    if (separated := _separated(look)) is not None:
        return separated
    numbers = as_numbers(values)
    if numbers and not as_classes and (look.distinct > MAX_NUMBERS or any(n != int(n) for n in numbers)):
        why = f"numbers, {look.distinct:,} distinct, from {min(numbers):g} to {max(numbers):g}"
        return Target(look, "regression", f"{why}; if each number is the name of a class, add --classes")
    if look.distinct == 1:
        raise DataError(
            f"the target '{look.name}' is '{values[0]}' in all of the first {look.num_rows:,} rows: there is nothing "
            "to learn"
        )
    if not as_classes and (look.distinct > MAX_CLASSES or look.distinct > FREE_TEXT_SHARE * len(values)):
        raise DataError(
            f"the target '{look.name}' has {look.distinct:,} different values in {len(values):,} rows, too many to "
            "be classes: name another column, or add --classes if it is meant"
        )
    rare = sum(count < 3 for count in Counter(map(str, values)).values())
    why = f"{look.distinct:,} classes" + (
        f", {rare} of them with fewer than 3 of the {look.num_rows:,} rows" if rare else ""
    )
    return Target(look, "binary" if look.distinct == 2 else "multiclass", why)


def _as_list(value: Any) -> list[Any] | None:
    """The classes of a list, also of one that is written as text; None of anything else."""
    if isinstance(value, list | tuple | set):
        return list(value)
    try:
        return read_list(value.strip()) if isinstance(value, str) and value.strip() else None
    except ValueError:
        return None


def _separated(look: Look) -> Target | None:
    """Several classes in one string, such as `red|round`."""
    texts = look.texts
    if len(texts) < len(look.values):
        return None
    for separator in ("|", ";"):
        several = [text.split(separator) for text in texts if separator in text]
        names = {name.strip() for text in texts for name in text.split(separator)}
        if len(several) >= 0.1 * len(texts) and len(names) <= look.distinct:
            return Target(
                look, "multilabel", f"{len(names):,} classes, several a row separated by '{separator}'", separator
            )
    return None
