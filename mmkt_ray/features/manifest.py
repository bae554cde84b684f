"""What a store's `manifest.json` holds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from mmkt_ray.record import IfAny, OpenRecord, Record, SealedRecord

MANIFEST = "manifest.json"  # in the store's folder
Folder = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # a name that leads nowhere else


class ModalityFeatures(OpenRecord, frozen=True, strict=True):
    """One modality's features, and what made them."""

    spread: ClassVar[str] = "found"

    dim: int = Field(ge=1)
    sparse: bool
    kind: str
    encoder: dict[str, Any]  # the config's section
    reduce: dict[str, Any] | None  # the same
    fingerprint: str
    folders: list[Folder] = Field(max_length=2)  # of the fitted encoder and reducer, in the run's `encoders/`
    found: dict[str, Any] = Field(default_factory=dict)  # out of the values, for people; see `EncoderCard.found`


class TaskClasses(Record, frozen=True, strict=True):
    """One task."""

    kind: str | dict[str, Any]  # see `TaskKind.as_json`
    classes: list[str]  # of train


class Counts(Record, frozen=True, strict=True):
    """Rows of a store."""

    rows: int
    by_split: dict[str, int]
    by_task: dict[str, dict[str, dict[str, int]]]  # task -> split -> class -> rows
    missing: dict[str, dict[str, int]]  # modality -> split -> rows without it
    rejects: int = 0
    unreadable_modalities: int = 0  # rows that are there without a modality that could not be read


class Speed(Record, frozen=True, strict=True):
    """How long it took to make a store."""

    stages: dict[str, float]  # stage -> seconds in all processes together
    wall_s: float
    startup_s: float  # until the first part was there, less the work on it
    rows_per_s: float


class Manifest(SealedRecord):
    """The identity card of a store."""

    schema_version: ClassVar[int] = 2  # 2: checksums
    again: ClassVar[str] = "remove the folder '{folder}' and run the same command again"

    fingerprint: str
    parts: list[str]  # files in `data/`
    checksums: dict[str, str]  # of these
    units: list[str]  # what the parts come from: shards by content, or `joined`, `paired`
    layout: str  # see `reading_layout`
    source: str | None  # the fingerprint of the store that it was made from
    combine: dict[str, Any]  # the config's section
    synthetic_pairs: bool
    modalities: dict[str, ModalityFeatures]
    tasks: dict[str, TaskClasses]
    counts: Counts
    reject_reasons: dict[str, int]
    unmapped: dict[str, int]  # suffix of members of archives that no column maps -> members
    cleaned: dict[str, int]  # `text: control characters` -> values
    num_conflicting_labels: IfAny[int] = None  # of joined samples
    stages: IfAny[dict[str, float]] = None  # these four as in `Speed`; None: nothing had to be done
    wall_s: IfAny[float] = None
    startup_s: IfAny[float] = None
    rows_per_s: IfAny[float] = None

    @property
    def speed(self) -> Speed | None:
        """How long it took; None where nothing had to be done."""
        if self.stages is None or self.wall_s is None or self.startup_s is None or self.rows_per_s is None:
            return None
        return Speed(stages=self.stages, wall_s=self.wall_s, startup_s=self.startup_s, rows_per_s=self.rows_per_s)
