"""Where raw shards are and how their rows become samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_serializer, model_validator

from mmkt_ray.section import Once, Section, as_mapping, name_in, without_later


def known_encoding(name: str) -> str:
    """A name of a text encoding. Raises: ValueError."""
    try:
        "".encode(name)
    except (LookupError, ValueError):  # ValueError: a NUL in it
        raise ValueError("unknown text encoding; usual ones: utf-8, latin-1, cp1252, utf-16") from None
    return name


Filled = Annotated[str, Field(min_length=1)]


class HttpConfig(Section):
    """How addresses are fetched."""

    concurrency: int = Field(16, ge=1, le=256, description="addresses that a reading task fetches at once")
    timeout_s: float = Field(
        20.0, gt=0, le=3600, description="of one try, from the connection to the last byte; seconds"
    )
    num_retries: int = Field(
        3, ge=0, le=10, description="after a time-out, a broken connection, 408, 429 or 5xx; with backoff"
    )
    max_bytes: int = Field(20_000_000, ge=1, description="a longer answer is not read to its end")
    max_redirects: int = Field(5, ge=0, le=20, description="each is checked like the address itself")


class SourceConfig(Section):
    """One set of shards that share a layout."""

    reader: Literal["parquet", "webdataset", "folders", "manifest"] = Field(description="layout of the shards")
    path: Filled = Field(
        description="file, folder, glob (**: folders at any depth) or URI; relative paths are under data_root"
    )
    columns: dict[str, Filled | Annotated[tuple[Filled, ...], Field(min_length=1), Once]] = Field(
        description="our column (modality, task, sample_id, split or key) -> the source's column, tar suffix or json "
        "field; for a kind of modality that is made of several a list of them, in which * stands for any part of a "
        "name; for vectors also a file beside the shard with a row for each of its rows, vectors.npy or {shard}.npy"
    )
    split: Literal["train", "val", "test"] | None = Field(
        None, description="split of all rows here; null: from a split column, the folder's name, or a hash of the id"
    )
    absent: Literal["error", "null"] = Field(
        "error",
        description="a modality or task whose column a shard lacks: an error, or null in all of the shard's rows",
    )
    encoding: Annotated[str, AfterValidator(known_encoding)] = Field(
        "utf-8", description="text encoding of the raw files"
    )
    limit: int | None = Field(None, ge=1, description="read at most this many rows of each shard (for a quick look)")
    allow_outside: bool = Field(
        False, description="manifest cells may be absolute paths or leave the manifest's folder"
    )
    allow_http: bool = Field(
        False, description="manifest cells of images and sounds may be http(s) addresses; each failure is a reject"
    )
    allow_private_addresses: bool = Field(
        False,
        description="such an address may lead to this machine or its local network: 127.0.0.1, 10.*, 169.254.*, ..",
    )
    http: HttpConfig = Field(HttpConfig(), description="limits of fetching")

    @model_serializer(mode="wrap")
    def _without_later(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return without_later(self, handler(self), frozenset({"allow_http", "allow_private_addresses", "http"}))

    @model_validator(mode="after")
    def _addresses_are_in_manifests(self) -> SourceConfig:
        if self.allow_http and self.reader != "manifest":
            raise ValueError(
                "allow_http goes with reader: manifest, which reads CSV, JSONL and Parquet with names of files"
            )
        return self

    def theirs(self, column: str) -> tuple[str, ...]:
        """The source's columns that fill one of ours."""
        theirs = self.columns[column]
        return (theirs,) if isinstance(theirs, str) else theirs

    def arrays(self, shard: str) -> dict[str, str]:
        """Our columns that files of NumPy beside a shard fill -> the name of each.
        shard: the name of its own file."""
        stem = shard.rpartition(".")[0]
        named = {c: theirs for c, theirs in self.columns.items() if isinstance(theirs, str) and theirs.endswith(".npy")}
        return {c: name.replace("{shard}", stem) for c, name in named.items()}


class SplitConfig(Section):
    """Shares of the rows that no source gives a split, drawn by a hash of the sample id (or of the join key)."""

    val_frac: float = Field(
        0.1, ge=0, lt=1, description="share for validation; also taken from given train rows if no source gives val"
    )
    test_frac: float = Field(0.2, ge=0, lt=1, description="share for test")
    draw: int = Field(
        0, ge=0, description="another number draws other rows, to see how much a result hangs on the split"
    )

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> SplitConfig:
        if self.val_frac + self.test_frac >= 1:
            raise ValueError("val_frac + test_frac must be below 1, or nothing is left to train on")
        return self


class UnionCombine(Section):
    """Unpaired rows one after another, nulls elsewhere."""

    name: Literal["union"] = "union"


class JoinCombine(Section):
    """Rows with the same `key` become one sample."""

    name: Literal["join"] = "join"
    how: Literal["inner", "outer"] = Field(
        "inner", description="outer keeps rows without a partner (missing modalities)"
    )


class PairCombine(Section):
    """Synthetic pairs within a split: each row of one modality gets a random row of the other with the matching
    label."""

    name: Literal["pair"] = "pair"
    labels: dict[str, str] = Field(
        description="modality -> the task whose label decides the match, two entries; the first is kept once per row"
    )
    mapping: dict[str, str] | None = Field(
        None, description="class of the first label -> class of the second; null: the same class names"
    )


CombineConfig = Annotated[
    Annotated[UnionCombine, Tag("union")] | Annotated[JoinCombine, Tag("join")] | Annotated[PairCombine, Tag("pair")],
    Discriminator(name_in),
    BeforeValidator(as_mapping),
]


class SamplesConfig(Section):
    """Where the raw shards are and how their rows become samples."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="the sets of shards")
    combine: CombineConfig = Field(UnionCombine(), description="how rows of several sources become samples")
    split: SplitConfig = Field(SplitConfig(), description="shares of val and test where none is given")
    max_image_pixels: int = Field(64_000_000, ge=1, description="images with more pixels are rejected unread")
    decode: Literal["scaled", "exact"] = Field(
        "scaled",
        description="JPEGs of twice the size that their encoder reads and more, as photos are: scaled makes them "
        "smaller while they are decoded, exact decodes every pixel first, which takes longer; features differ by "
        "less than 1 %",
    )
    decode_timeout_s: float = Field(
        30.0, gt=0, le=86_400, description="an image or sound that takes longer to decode counts as broken; seconds"
    )
    drop_leakage: bool = Field(
        False,
        description="leave out train rows whose whole content is in val or test too (the audit lists them anyway); "
        "encoders are not fitted on them either, which takes one more pass over the shards. Under join and pair it "
        "is combined samples that are left out, after encoders and reducers are fitted on their rows",
    )
    max_reject_frac: float = Field(
        0.01, ge=0, le=1, description="the job stops when more rows than this are rejected or lose a modality"
    )
    min_reject_budget: int = Field(
        10, ge=0, description="rows that may be so in any case, however few there are, as long as half of all are whole"
    )
