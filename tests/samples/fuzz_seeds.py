"""Valid files of every kind that is read, and the damage and malice done to them before they are read again."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import struct
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from hypothesis import strategies as st
from PIL import Image

OUTSIDE = "../outside/secret.png"  # beside the folder that is read; nothing may open it
HOSTILE_PATHS = [
    *(
        OUTSIDE,
        "../../outside/secret.png",
        "x/../../outside/secret.png",
        "link.png",
        "linked/secret.png",
        "loop",
        "pipe",
    ),
    *(
        "/etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "s3://bucket/key",
        "http://host/x",
        "~/x",
        ".",
        "..",
        "/",
        "",
        "a.png/x",
    ),
    *(
        "a\0b",
        "x" * 300,
        "x/" * 3000,
        "\ud800",
        "*",
        "?",
        "%2e%2e/outside/secret.png",
        "..\\outside\\secret.png",
        "a.png",
    ),
]
TOKENS = [
    *(path.encode("utf-8", "surrogatepass") for path in HOSTILE_PATHS),
    *(
        b'"',
        b",",
        b"\n",
        b"\r",
        b"{",
        b"[" * 2000,
        b"null",
        b"NaN",
        b"1e999",
        b"-1",
        b"9" * 5000,
        b"\\ud800",
        b"\xff\xfe",
        b"\0" * 512,
    ),
]
EXTREMES = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


# --- images and sounds --------------------


def _picture(mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Every format and mode that is decoded: plain, animated, 16 bit, with EXIF data, progressive, interlaced."""
    photo, frames = _picture(), [Image.new("RGB", (9, 7), c) for c in ("red", "blue")]
    ramp = np.linspace(0, 65535, 63).reshape(9, 7)
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = {"save_all": True, "append_images": frames[1:]}
    found = {
        f"{kind.lower()} rgb": _encoded(photo, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
    }
    found |= {
        f"{kind.lower()} animated": _encoded(frames[0], kind, **animated) for kind in ("GIF", "WEBP", "TIFF", "PNG")
    }
    found |= {f"png {mode}": _encoded(_picture(mode), "PNG") for mode in ("L", "LA", "RGBA", "P", "1")}
    found |= {
        f"tiff {c}": _encoded(photo, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    }
    found |= {f"bmp {mode}": _encoded(_picture(mode), "BMP") for mode in ("L", "P", "1")}
    return found | {
        "jpeg exif": _encoded(photo, "JPEG", exif=exif),
        "jpeg progressive": _encoded(photo, "JPEG", progressive=True),
        "jpeg cmyk": _encoded(_picture("CMYK"), "JPEG"),
        "png profile": _encoded(photo, "PNG", icc_profile=b"profile" * 50, exif=exif),
        "png 16 bit": _encoded(Image.fromarray(ramp.astype(np.uint16)), "PNG"),
        "tiff 16 bit": _encoded(Image.fromarray(ramp.astype(np.uint16)), "TIFF"),
        "tiff float": _encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        "ppm grey": _encoded(_picture("L"), "PPM"),
        "webp lossless": _encoded(_picture("RGBA"), "WEBP", lossless=True),
    }


def sounds() -> dict[str, bytes]:
    """WAV, FLAC and OGG in several encodings, mono and stereo."""
    wave = 0.5 * np.sin(np.arange(2_000) / 9.0)
    kinds = [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "ULAW"),
        ("WAV", "IMA_ADPCM"),
        ("RF64", "PCM_24"),
        ("WAVEX", "PCM_16"),
    ]
    kinds += [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
    found = {}
    for container, encoding in kinds:
        buffer = io.BytesIO()
        channels = 1 if encoding == "IMA_ADPCM" else 2
        soundfile.write(buffer, np.stack([wave] * channels, axis=1), 16_000, format=container, subtype=encoding)
        found[f"{container.lower()} {encoding.lower()}"] = buffer.getvalue()
    return found


# --- shards --------------------

PNG = _encoded(_picture("P", (6, 5)), "PNG")


def tar_bytes(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tars() -> dict[str, bytes]:
    """A WebDataset shard and class folders in the three formats of tar."""
    samples = [
        (f"d/{k}.{suffix}", data)
        for k in range(3)
        for suffix, data in (("png", PNG), ("txt", b"some text %d" % k), ("json", b'{"kind": %d}' % k))
    ]
    classes = [(f"train/{kind}/{k}.txt", f"Über {kind}".encode()) for kind in ("cats", "dogs") for k in range(2)]
    long = [(f"train/{'l' * 120}/é{k}.txt", b"text") for k in range(2)]
    return {
        "webdataset ustar": tar_bytes(samples),
        "webdataset gnu": tar_bytes(samples, tarfile.GNU_FORMAT),
        "webdataset pax": tar_bytes([*samples, *long], tarfile.PAX_FORMAT),
        "folders ustar": tar_bytes(classes),
        "folders gnu": tar_bytes([*classes, *long], tarfile.GNU_FORMAT),
        "folders pax": tar_bytes([*classes, *long], tarfile.PAX_FORMAT),
    }


def _table() -> pa.Table:
    rows = range(12)
    image = pa.array([{"bytes": PNG if i % 3 else None, "path": None if i % 3 else "a.png"} for i in rows])
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "id": pa.array([f"id|{i}" for i in rows]),
            "image": image,
            "raw": pa.array([PNG] * 12),
            "text": pa.array([None if i == 5 else f"tëxt {i}" for i in rows]),
            "label": pa.array([i % 2 for i in rows]),
            "when": pa.array([10**15 * i for i in rows], pa.timestamp("us")),
            "tags": pa.array([["a", "b"][: i % 3] for i in rows]),
            "name": pa.array([f"n{i % 2}" for i in rows]).dictionary_encode(),
        }
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquets() -> dict[str, bytes]:
    """One table with Hugging Face images, written in several encodings, compressions and page formats."""
    layouts: dict[str, dict[str, object]] = {
        "snappy": {"compression": "snappy"},
        "zstd pages v2": {"compression": "zstd", "data_page_version": "2.0", "data_page_size": 64},
        "gzip": {"compression": "gzip", "row_group_size": 4},
        "plain": {"compression": "none", "use_dictionary": False},
        "lz4 checksums": {"compression": "lz4", "write_page_checksum": True, "write_page_index": True},
        "brotli": {"compression": "brotli", "use_byte_stream_split": False},
        "delta": {
            **{"compression": "none", "use_dictionary": False},
            "column_encoding": {
                "text": "DELTA_BYTE_ARRAY",
                "raw": "DELTA_LENGTH_BYTE_ARRAY",
                "label": "DELTA_BINARY_PACKED",
            },
        },
    }
    found = {}
    for name, options in layouts.items():
        sink = io.BytesIO()
        pq.write_table(_table(), sink, **options)
        found[name] = sink.getvalue()
    return found


def manifests() -> dict[str, bytes]:
    """CSV, JSON lines and Parquet that name image files."""
    rows = [
        {"file": f"{'ab'[i % 2]}.png", "text": f'tëxt, "{i}"\nline', "label": i % 2, "tags": "x;y"} for i in range(6)
    ]
    plain = io.StringIO()
    writer = csv.DictWriter(plain, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    lines = "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows))
    return {"csv": plain.getvalue().encode(), "jsonl": lines.encode(), "parquet": table.getvalue()}


# --- damage --------------------

Edit = tuple[str, int, int]  # what is done, where, with what; the numbers are taken modulo what there is


def _flip(data: bytes, where: int, what: int) -> bytes:
    i = where % len(data)
    return data[:i] + bytes([data[i] ^ (1 << what % 8)]) + data[i + 1 :]


def _number(data: bytes, where: int, what: int) -> bytes:
    """An extreme integer in the place of a length."""
    value, rest = EXTREMES[what % len(EXTREMES)], what // len(EXTREMES)
    width = (1, 2, 4, 8)[rest % 4]
    number = (value & (1 << 8 * width) - 1).to_bytes(width, "little" if rest // 4 % 2 else "big")
    i = where % len(data)
    return data[:i] + number + data[i + width :]


def _swap(data: bytes, where: int, what: int) -> bytes:
    """Two fields of four bytes change places."""
    i, j = sorted((4 * where % len(data), 4 * what % len(data)))
    if j < i + 4:
        return data
    return data[:i] + data[j : j + 4] + data[i + 4 : j] + data[i : i + 4] + data[j + 4 :]


def _span(data: bytes, where: int, what: int) -> tuple[int, int]:
    start = where % len(data)
    return start, start + 1 + what % min(200, len(data))


def _remove(data: bytes, where: int, what: int) -> bytes:
    start, end = _span(data, where, what)
    return data[:start] + data[end:]


def _double(data: bytes, where: int, what: int) -> bytes:
    start, end = _span(data, where, what)
    return data[:end] + data[start:end] * (1 + what % 3) + data[end:]


def _insert(data: bytes, where: int, what: int) -> bytes:
    i = where % len(data)
    return data[:i] + TOKENS[what % len(TOKENS)] + data[i:]


def _overwrite(data: bytes, where: int, what: int) -> bytes:
    i, token = where % len(data), TOKENS[what % len(TOKENS)]
    return data[:i] + token + data[i + len(token) :]


def _rename(data: bytes, where: int, what: int) -> bytes:
    """A hostile path where a file is named."""
    names = (b"a.png", b"b.png")
    return data.replace(names[where % 2], TOKENS[what % len(HOSTILE_PATHS)])


EDITS: dict[str, Callable[[bytes, int, int], bytes]] = {
    **{"flip": _flip, "number": _number, "swap": _swap, "cut": lambda data, where, what: data[: where % len(data)]},
    **{"remove": _remove, "double": _double, "insert": _insert, "overwrite": _overwrite, "rename": _rename},
}


def damaged(data: bytes, edits: list[Edit], mend: Callable[[bytes], bytes] | None = None) -> bytes:
    """The data after the edits; `mend` sets checksums right, so that the damage gets past them."""
    for name, where, what in edits:
        data = EDITS[name](data, where, what) if data else data
    return mend(data) if mend else data


def mend_png(data: bytes) -> bytes:
    """The right checksum at each chunk of a PNG; other data as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, i = bytearray(data), 8
    while i + 12 <= len(out):
        end = i + 8 + int.from_bytes(out[i : i + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[i + 4 : end]))
        i = end + 4
    return bytes(out)


def mend_tar(data: bytes) -> bytes:
    """The right checksum at each block of a tar that looks like a header."""
    out = bytearray(data)
    for i in range(0, len(out) - 511, 512):
        if out[i + 257 : i + 262] == b"ustar":
            out[i + 148 : i + 156] = b" " * 8
            out[i + 148 : i + 156] = b"%06o\0 " % sum(out[i : i + 512])
    return bytes(out)


# --- strategies --------------------

_WORDS = st.integers(0, 2**32 - 1)
_EDITS = st.lists(st.tuples(st.sampled_from(sorted(EDITS)), _WORDS, _WORDS), min_size=1, max_size=6)

_PAX = [
    *(
        b"path=../../x.txt",
        b"path=/etc/passwd",
        b"path=a\0b",
        b"path=\xff\xfe",
        b"linkpath=/etc/passwd",
        b"hdrcharset=BINARY",
    ),
    *(b"size=-1", b"size=99999999999999", b"size=x", b"size=0", b"mtime=nan", b"uid=9e99", b"hdrcharset=\xff"),
    *(
        b"GNU.sparse.major=1",
        b"GNU.sparse.minor=0",
        b"GNU.sparse.map=0,1,x",
        b"GNU.sparse.map=0,99999999999",
        b"GNU.sparse.size=x",
    ),
    *(
        b"GNU.sparse.size=99",
        b"GNU.sparse.offset=0",
        b"GNU.sparse.numbytes=1",
        b"GNU.sparse.realsize=99999999999",
        b"GNU.sparse.name=../x",
    ),
]
_SIZES = [
    b"00000000000\0",
    b"77777777777\0",
    b"-1".ljust(12, b"\0"),
    b"\xff" * 12,
    b"\x80" + b"\x7f" * 11,
    b"\x80" + bytes(10) + b"\x09",
    b"garbage",
]
_CONTENTS = [b"", b"text", PNG, b'{"kind": "a"}', b"[" * 3000, b"\xff\xfe", b"99999999\n0\n1\n", b"x\n", b"5\n" * 300]


def _pax_record(record: bytes) -> bytes:
    length = next(n for n in range(len(record) + 3, len(record) + 9) if n == len(record) + 2 + len(str(n)))
    return b"%d %s\n" % (length, record)


@st.composite
def _member(draw: st.DrawFn) -> bytes:
    """A tar member of any type, with an honest or a lying size."""
    kind = draw(st.sampled_from([*b"000077123456789SLKxgXDMVN\0"]))
    content = draw(st.sampled_from(_CONTENTS))
    if kind in b"xgX":
        content = b"".join(map(_pax_record, draw(st.lists(st.sampled_from(_PAX), max_size=4))))
    name = draw(st.sampled_from([*HOSTILE_PATHS, "d/1.png", "d/1.txt", "d/1.json", "cats/2.txt"]))
    link = draw(st.sampled_from(HOSTILE_PATHS))
    size = b"%011o\0" % len(content) if draw(st.booleans()) else draw(st.sampled_from(_SIZES))
    header = b"".join(
        field[:width].ljust(width, b"\0")
        for field, width in [
            (name.encode("utf-8", "surrogatepass"), 100),
            *((b"0000644\0", 8), (b"0000000\0", 8), (b"0000000\0", 8), (size, 12), (b"00000000000\0", 12), (b"", 8)),
            *((bytes([kind]), 1), (link.encode("utf-8", "surrogatepass"), 100), (b"ustar\x0000", 8), (b"", 247)),
        ]
    )
    return header + content.ljust(512 * math.ceil(len(content) / 512), b"\0")


Case = tuple[str, bytes]  # which seed (or layout) it comes of, the file


def _mutated(seeds: dict[str, bytes], mend: Callable[[bytes], bytes] | None = None) -> st.SearchStrategy[Case]:
    menders = st.sampled_from([None, mend]) if mend else st.none()
    return st.builds(
        lambda name, edits, mender: (name, damaged(seeds[name], edits, mender)),
        st.sampled_from(sorted(seeds)),
        _EDITS,
        menders,
    )


def _packed(case: Case, edits: list[Edit]) -> Case:
    """A tar as .tar.gz, which may be damaged itself."""
    return f"{case[0]} gz", damaged(gzip.compress(case[1], 1, mtime=0), edits)


def strategies() -> dict[str, st.SearchStrategy[Case]]:
    """Kind of file -> its damaged files."""
    built = st.builds(
        lambda layout, members: (f"{layout} built", mend_tar(b"".join(members)) + bytes(1024)),
        *(st.sampled_from(["webdataset", "folders"]), st.lists(_member(), min_size=1, max_size=5)),
    )
    plain = st.one_of(_mutated(tars(), mend_tar), built)
    return {
        "images": _mutated(images(), mend_png),
        "sounds": _mutated(sounds()),
        "tars": st.one_of(plain, st.builds(_packed, plain, st.one_of(st.just([]), _EDITS))),
        "parquet": _mutated(parquets()),
        "manifests": _mutated(manifests()),
    }
