"""Writes docs/report.webp: the first screen of a run's report page, as README shows it. Needs Chromium.

    make demo
    .venv/bin/python docs/picture.py runs/openmoji
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).with_name("report.webp")
WIDTH, HEIGHT, SCALE = 1100, 835, 1.5  # of the window in CSS pixels; pixels of the picture per CSS pixel
MAX_BYTES = 150_000


def take(page: Path, chromium: str) -> Image.Image:
    """What a window of this size shows of a page."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={folder}/chromium", f"--window-size={WIDTH},{HEIGHT}"]
        options += [f"--force-device-scale-factor={SCALE}", f"--screenshot={shot}"]
        subprocess.run([chromium, *options, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
        return Image.open(shot).convert("RGB")


def main() -> None:
    """Take the picture with the best quality that stays below MAX_BYTES."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--chromium", default="chromium", help="the browser's program (default: chromium)")
    args = parser.parse_args()
    picture = take(args.run / "report" / "index.html", args.chromium)
    for quality in range(90, 20, -5):
        picture.save(PICTURE, quality=quality, method=6)
        if PICTURE.stat().st_size < MAX_BYTES:
            break
    print(f"{PICTURE}: {picture.width} x {picture.height}, {PICTURE.stat().st_size / 1000:.0f} kB, quality {quality}")


if __name__ == "__main__":
    main()
