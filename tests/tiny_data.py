"""A few rows of each data set that jobs/configs/ name, in the layout that the config reads."""

import csv
import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkt_ray.samples import fetch as fetching
from tests.shapes import COLOURS, png

EVERY = 26  # of so many emoji one is taken
GROUPS = (  # of 20 Newsgroups: those that cifar10_20news.yaml pairs with a class of CIFAR-10
    *("sci.space", "rec.autos", "talk.religion.misc", "alt.atheism", "talk.politics.guns"),
    *("rec.sport.baseball", "sci.med", "rec.sport.hockey", "misc.forsale", "rec.motorcycles"),
)
PRODUCT = (  # columns of baby_products.csv
    *("int_id", "ext_id", "title", "SKU", "price", "is_discounted", "category", "company_struct", "company_free"),
    *("brand", "weight", "length", "width", "height", "fabrics", "colors", "materials"),
)


def few_emoji(patch: pytest.MonkeyPatch) -> None:
    """`mmkt fetch openmoji` and `openmoji-keywords` draw some of the emoji only."""
    every = fetching._emoji_entries
    patch.setattr(fetching, "_emoji_entries", lambda: every()[::EVERY])
    patch.setattr(fetching, "MIN_KEYWORD_EMOJI", 4)


def write_all(data: Path) -> None:
    """What `mmkt fetch` does not write, and CIFAR-10 as it writes that from the archive."""
    rng = np.random.default_rng(0)
    write_cifar10(data, rng)
    write_news(data / "20news-bydate.tar.gz", rng)
    for vendor in ("google", "twitter"):
        write_vendor(data / "emoji" / f"{vendor}-00000.tar", rng)
    write_digits(data / "digits", rng)
    write_products(data / "tables" / "baby_products.csv")


def write_cifar10(data: Path, rng: np.random.Generator, images_each: int = 3) -> None:
    """Each class as often in each of the six batches."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    labels = np.arange(10 * images_each, dtype=np.uint8)[:, None] % 10
    pixels = [rng.integers(0, 256, (len(labels), 3 * 32 * 32), np.uint8) // 4 + 20 * labels for _ in names]
    batches = [np.hstack([labels, images]).astype(np.uint8).tobytes() for images in pixels]
    data.mkdir(parents=True, exist_ok=True)
    archive = data / fetching.CIFAR10_ARCHIVE
    archive.write_bytes(
        fetching._tar_gz([(f"cifar-10-batches-bin/{n}", b) for n, b in zip(names, batches, strict=True)])
    )
    fetching.fetch("cifar10", str(data))


def write_news(path: Path, rng: np.random.Generator) -> None:
    words = np.array([f"word{i}" for i in range(60)])
    posts = [
        (f"20news-bydate-{split}/{group}/{i}", f"Subject: {group}\n\n{' '.join(rng.choice(words, 20))}\n".encode())
        for split, count in (("train", 12), ("test", 4))
        for group in GROUPS
        for i in range(count)
    ]
    path.write_bytes(fetching._tar_gz(posts))


def write_vendor(path: Path, rng: np.random.Generator) -> None:
    """60 emoji of three categories and six subcategories; the names are the same for every vendor."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(60):
            colour = list(COLOURS)[i % 3]
            about = {"category": colour, "subcategory": f"{colour} {i // 3 % 2}", "vendor": path.name.partition("-")[0]}
            files = {"png": png(colour, int(rng.integers(1000)), 64), "txt": f"{colour} face {i}".encode()}
            for ending, content in (files | {"json": json.dumps(about).encode()}).items():
                member = tarfile.TarInfo(f"{i:05x}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_digits(folder: Path, rng: np.random.Generator) -> None:
    """Eight recordings and eight images of each digit, six of them to train on."""
    for name, ending in (("audio", "wav"), ("images", "png")):
        (folder / name).mkdir(parents=True)
        with (folder / f"{name}.jsonl").open("w") as manifest:
            for i in range(80):
                digit, kind = i % 10, name.removesuffix("s")
                place = f"{name}/{digit}_{i}.{ending}"
                row = {"id": f"{kind}{i}", kind: place, "digit": digit, "split": "train" if i < 60 else "test"}
                row |= {"speaker": ("george", "lucas")[i // 10 % 2]} if kind == "audio" else {}
                manifest.write(json.dumps(row) + "\n")
                (write_sound if ending == "wav" else write_image)(folder / place, digit, rng)


def write_sound(path: Path, digit: int, rng: np.random.Generator) -> None:
    """0.4 s of a noisy tone, 8 kHz mono."""
    samples = 9000 * np.sin(np.arange(3200) * (0.1 + 0.05 * digit)) + rng.normal(0, 500, 3200)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(samples.astype(np.int16).tobytes())


def write_image(path: Path, digit: int, rng: np.random.Generator) -> None:
    """28 x 28 grey pixels."""
    Image.fromarray((rng.integers(0, 30, (28, 28)) + 20 * digit).astype(np.uint8)).save(path)


def write_products(path: Path) -> None:
    """120 products with the columns and the cells of the real file: units, quotes, lists, nothing."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(PRODUCT)
        for i in range(120):
            kind = ("Nursery Bedding", "Strollers", "Toys")[i % 3]
            name = [
                i + 1,
                1000 + i,
                f"Peanut {kind} number {i}",
                f"A{i}B",
                f"{20 + 30 * (i % 3) + i % 5}.99",
                i % 2,
                kind,
            ]
            makers = ["Peanut Shell", "", ("", "Ivy")[i % 2]]
            sizes = [("", "1.5 lbs")[i % 2], f'{i % 9 + 20}"', "", f'{i % 7 + 5}"']
            stuff = [("cotton / polyester", "taffeta", "")[i % 3], "mauve / cream", ("", "wood")[i % 2]]
            rows.writerow([*name, *makers, *sizes, *stuff])
