"""The same content twice: across splits (leakage), within one, and under different labels (conflicts).

Content is compared by the 64-bit hashes that the parts of a store hold beside the features: of pixels or audio as
decoded (of JPEGs that were made smaller meanwhile of their coded data, see docs/extraction.md), of texts as
normalised, case and white space aside. What is found is written to `<store>/audit.json`, see `Audit`.

Memory: about 10 bytes a row and modality, and the ids and labels of the examples.
Axes: N rows, G groups of equal content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from mmkt_ray import storage
from mmkt_ray.config import SPLITS
from mmkt_ray.features.store import hash_of
from mmkt_ray.record import About, IfAny, OpenRecord, Record

MAX_EXAMPLES = 100  # groups of each kind that are listed
MAX_SAMPLES = 10  # samples listed of one group

# --- what audit.json holds -----------------------------------------------------------------------------------------


class GroupSample(Record, frozen=True):
    """A sample of an example."""

    sample_id: str
    split: str
    labels: dict[str, Any]  # task -> label as the kind has it, None where there is none


class Example(Record, frozen=True):
    """A group of samples with the same content."""

    splits: list[str]
    num_rows: int
    samples: list[GroupSample]  # the first MAX_SAMPLES


class Conflicts(Record, frozen=True):
    """Groups of the same whole content and different labels of a task."""

    num_groups: int
    num_rows: int  # in groups
    examples: list[Example]


class Duplicates(Conflicts, frozen=True):
    """Groups of the same content, leaking ones first."""

    by_splits: dict[str, int]  # `test+train` -> groups
    num_leaking: int  # train rows whose content is in val or test too


class LabelIssueCounts(Record, frozen=True):
    """Label issues of a task."""

    label: int  # the label contradicts the modalities
    modalities: int  # the modalities contradict each other


class LabelIssue(OpenRecord, frozen=True):
    """A train row to look at again, with what its modalities show."""

    spread: ClassVar[str] = "confidences"

    sample_id: str
    task: str
    kind: str  # label | modalities, see `LabelIssueCounts`
    label: str | None
    predicted: str | None  # class, or what each modality says
    score: float  # 0..1
    confidences: dict[str, float | None]  # `<modality>_confidence` in the label; None where the row lacks it
    inputs: dict[str, dict[str, Any] | None] = Field(default_factory=dict)  # modality -> `ModalityKind.show`

    @classmethod
    def from_row(cls, row: Mapping[Hashable, Any], inputs: dict[str, dict[str, Any] | None]) -> LabelIssue:
        """Of a row of suspects.parquet: three decimals, None for what is not there."""
        rounded = {k: (round(v, 3) if v == v else None) if isinstance(v, float) else v for k, v in row.items()}
        return cls.model_validate(rounded | {"inputs": inputs})


class LabelIssues(Record, frozen=True):
    """What studies/label_issues.py found among the train rows of a store."""

    num_rows: dict[str, int]  # task -> rows whose labels were checked
    num_suspects: dict[str, LabelIssueCounts]  # by task
    top: list[LabelIssue]  # the first ones
    note: IfAny[str] = None  # why they have no inputs
    about: IfAny[About] = None


class Audit(Record, frozen=True):
    """`<store>/audit.json`. Samples are duplicates where the same modalities are present,
    each with the same content."""

    num_rows: int = 0
    modalities: dict[str, Duplicates] = Field(default_factory=dict)  # of each modality
    samples: IfAny[Duplicates] = None  # of whole samples; None: the store was not audited
    conflicts: dict[str, Conflicts] = Field(default_factory=dict)  # by task
    # `<task>: '1.0' read as '1'` -> rows of a class in other words
    spellings: dict[str, int] = Field(default_factory=dict)
    nulled: dict[str, int] = Field(default_factory=dict)  # `<modality>: '<column>' is no number, read as null` -> rows
    suspects: IfAny[LabelIssues] = None

    def with_label_issues(self, found: LabelIssues | None) -> Audit:
        """The same with these in place of those before; None: with none."""
        return self.model_copy(update={"suspects": found})


# --- equal content -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """Hashes of N rows in the order of a store's parts."""

    parts: list[str]  # names of the parts
    lengths: list[int]  # their rows
    split: np.ndarray  # (N,) int8, index into SPLITS
    hashes: dict[str, np.ndarray]  # modality -> (N,) uint64
    present: dict[str, np.ndarray]  # modality -> (N,) bool

    def whole(self) -> np.ndarray:
        """Hash of all modalities of a row together, which are absent included: (N,) uint64."""
        mixed = np.zeros(len(self.split), dtype=np.uint64)
        for modality in sorted(self.hashes):
            spread = _mix(
                self.hashes[modality] ^ np.uint64(0x9E3779B97F4A7C15)
            )  # else a hash of 0 would be as an absent one
            mixed = _mix(mixed) + np.where(self.present[modality], spread, np.uint64(0))
        return mixed


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit (the finaliser of SplitMix64), so that sums of it seldom agree."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def read_contents(uri: str, parts: list[str], modalities: Sequence[str]) -> Contents:
    """The hash columns of a store's parts. Modalities that some part has no hashes of are left out."""
    known = set(map(hash_of, modalities))
    lengths = []
    for name in parts:
        fs, path = storage.resolve(storage.join(uri, "data", name))
        metadata = pq.read_metadata(path, filesystem=fs)
        known &= set(metadata.schema.to_arrow_schema().names)
        lengths.append(metadata.num_rows)
    num_rows, kept = sum(lengths), [m for m in modalities if hash_of(m) in known]
    contents = Contents(
        parts,
        lengths,
        np.empty(num_rows, np.int8),
        {m: np.empty(num_rows, np.uint64) for m in kept},
        {m: np.empty(num_rows, bool) for m in kept},
    )
    for name, end, length in zip(parts, np.cumsum(lengths, dtype=int), lengths, strict=True):
        table = storage.read_table(storage.join(uri, "data", name), ["split", *map(hash_of, kept)])
        here = slice(end - length, end)
        contents.split[here] = pc.index_in(table.column("split"), pa.array(SPLITS)).to_numpy()
        for m in kept:
            column = table.column(hash_of(m))
            contents.present[m][here] = column.is_valid().to_numpy()
            contents.hashes[m][here] = pc.fill_null(column, pa.scalar(0, pa.uint64())).to_numpy()
    return contents


@dataclass(frozen=True)
class Groups:
    """Rows of the same content, group by group."""

    rows: np.ndarray  # rows of all groups, those of one group together
    group: np.ndarray  # the group of each of them, 0 .. G-1, rising
    split_sets: np.ndarray  # (G,) bit set of the splits of a group's rows
    leaks: np.ndarray  # (G,) bool: has a train row and one of val or test

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.split_sets)


def find_groups(hashes: np.ndarray, rows: np.ndarray, split: np.ndarray) -> Groups:
    """Groups of two and more among `rows` with equal hashes. hashes, split: of all N rows."""
    rows = rows[np.argsort(hashes[rows], kind="stable")]
    found = hashes[rows]
    first = np.ones(len(found), dtype=bool)  # of its group
    first[1:] = found[1:] != found[:-1]
    repeated = ~(first & np.append(first[1:], True))
    rows, group = rows[repeated], np.cumsum(first[repeated]) - 1
    split_sets = np.zeros(int(group.max(initial=-1)) + 1, dtype=np.int8)
    np.bitwise_or.at(split_sets, group, np.int8(1) << split[rows])
    train = np.int8(1 << SPLITS.index("train"))
    return Groups(rows, group, split_sets, ((split_sets & train) != 0) & (split_sets != train))


def leaking_rows(contents: Contents) -> np.ndarray:
    """(N,) bool: train rows whose whole content is in val or test too."""
    groups = find_groups(contents.whole(), np.arange(len(contents.split)), contents.split)
    leaking = np.zeros(len(contents.split), dtype=bool)
    leaking[groups.rows[groups.leaks[groups.group]]] = True
    return np.asarray(leaking & (contents.split == SPLITS.index("train")))


def audit(uri: str, parts: list[str], modalities: Sequence[str], tasks: Sequence[str]) -> Audit:
    """The parts of a store, audited."""
    contents = read_contents(uri, parts, modalities)
    labels = StoredLabels(uri, contents, tasks)
    found = {
        m: find_groups(contents.hashes[m], np.flatnonzero(contents.present[m]), contents.split)
        for m in sorted(contents.hashes)
    }
    whole = find_groups(contents.whole(), np.arange(len(contents.split)) if found else np.empty(0, int), contents.split)
    return Audit(
        num_rows=len(contents.split),
        modalities={m: _describe(groups, contents.split, labels) for m, groups in found.items()},
        samples=_describe(whole, contents.split, labels),
        conflicts={task: _conflicts(whole, labels, task) for task in tasks},
    )


def _describe(groups: Groups, split: np.ndarray, labels: StoredLabels) -> Duplicates:
    by_splits = Counter(groups.split_sets.tolist())
    train = split[groups.rows] == SPLITS.index("train")
    first = np.argsort(~groups.leaks, kind="stable")[:MAX_EXAMPLES]
    return Duplicates(
        num_groups=groups.num_groups,
        num_rows=len(groups.rows),
        by_splits={"+".join(_splits_in(bits)): n for bits, n in sorted(by_splits.items())},
        num_leaking=int((groups.leaks[groups.group] & train).sum()),
        examples=_examples(groups, first, labels),
    )


def _conflicts(groups: Groups, labels: StoredLabels, task: str) -> Conflicts:
    """Groups of the same content with more than one label of a task; rows without a label conflict with none."""
    codes = labels.codes(task, groups.rows)
    pairs = np.unique(np.stack([groups.group, codes])[:, codes >= 0], axis=1)
    wrong = np.flatnonzero(np.bincount(pairs[0], minlength=groups.num_groups) > 1)
    return Conflicts(
        num_groups=len(wrong),
        num_rows=int(np.isin(groups.group, wrong).sum()),
        examples=_examples(groups, wrong[:MAX_EXAMPLES], labels),
    )


def _examples(groups: Groups, chosen: np.ndarray, labels: StoredLabels) -> list[Example]:
    """Some groups with their first MAX_SAMPLES samples."""
    starts, ends = np.searchsorted(groups.group, [chosen, chosen + 1])
    members = [groups.rows[a:b][:MAX_SAMPLES] for a, b in zip(starts, ends, strict=True)]
    samples = iter(labels.samples(np.concatenate([np.empty(0, np.int64), *members])))
    return [
        Example(
            splits=_splits_in(int(groups.split_sets[g])), num_rows=int(b - a), samples=[next(samples) for _ in rows]
        )
        for g, a, b, rows in zip(chosen.tolist(), starts, ends, members, strict=True)
    ]


def _splits_in(bits: int) -> list[str]:
    return sorted(name for i, name in enumerate(SPLITS) if bits >> i & 1)


class StoredLabels:
    """Ids, splits and labels of some of a store's rows, read when they are asked for."""

    def __init__(self, uri: str, contents: Contents, tasks: Sequence[str]) -> None:
        self.uri, self.tasks, self.parts = uri, list(tasks), contents.parts
        self.ends = np.cumsum([0, *contents.lengths])

    def _read(self, rows: np.ndarray, columns: list[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Columns of the rows, part by part: which of the rows, and their table."""
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self.ends)
        for i in np.flatnonzero(np.diff(bounds)).tolist():
            here = order[bounds[i] : bounds[i + 1]]
            table = storage.read_table(storage.join(self.uri, "data", self.parts[i]), columns)
            yield here, table.take(pa.array(rows[here] - self.ends[i]))

    def codes(self, task: str, rows: np.ndarray) -> np.ndarray:
        """A number for each row's label, the same for the same label; -1 without a label."""
        codes = np.full(len(rows), -1, dtype=np.int64)
        known: dict[Any, int] = {}
        for here, table in self._read(rows, [task]):
            labels = (tuple(v) if isinstance(v, list) else v for v in table.column(0).to_pylist())
            codes[here] = [-1 if v is None else known.setdefault(v, len(known)) for v in labels]
        return codes

    def samples(self, rows: np.ndarray) -> list[GroupSample]:
        """The rows as an example lists them."""
        found: dict[int, GroupSample] = {}
        for here, table in self._read(rows, ["sample_id", "split", *self.tasks]):
            for i, r in zip(here.tolist(), table.to_pylist(), strict=True):
                labels = {t: r[t] for t in self.tasks}
                found[i] = GroupSample(sample_id=r["sample_id"], split=r["split"], labels=labels)
        return [sample for _, sample in sorted(found.items())]
