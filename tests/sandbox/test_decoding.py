"""Decoding in a child process: the same results as without, and no input that takes more than itself away."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from poison import poison

from mmkt_ray.errors import ResourceError
from mmkt_ray.kinds.images import InputSize, decode_and_tell
from mmkt_ray.kinds.modalities import MODALITY_KINDS
from mmkt_ray.kinds.sounds import decode_audio
from mmkt_ray.sandbox import decoding as decoder
from mmkt_ray.sandbox.child import Limits
from mmkt_ray.sandbox.decoding import Broken, decode_samples

IMAGE, AUDIO = MODALITY_KINDS["image"](), MODALITY_KINDS["audio"]()
LIMITS = Limits(max_pixels=10_000, timeout_s=20.0)
Png = Callable[..., bytes]


def encode(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, kind, **options)
    return buffer.getvalue()


def test_outcomes_are_those_of_decoding_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pixels, reasons or notes that are lost, changed or given to another sample on the way."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8 + i, 5 + i % 3, 3), np.uint8) for i in range(40)]
    values = [encode(image, ("PNG", "JPEG", "BMP")[i % 3]) for i, image in enumerate(images)]
    exif = Image.Exif()
    exif[0x0112] = 6
    values += [encode(images[0], "JPEG", exif=exif), b"", "no imäge".encode(), values[0][:60]]
    values += [encode(rng.integers(0, 256, (9, 7, 4), np.uint8), "PNG"), encode(np.zeros((200, 100), np.uint8), "PNG")]
    monkeypatch.setattr(decoder, "GROUP_SAMPLES", 17)
    outcomes = list(decode_samples(values, IMAGE, LIMITS))
    for value, outcome in zip(values, outcomes, strict=True):
        if isinstance(outcome, Broken):
            with pytest.raises(ValueError, match=f"^{re.escape(outcome.reason)}$"):
                decode_and_tell(value, LIMITS.max_pixels)
        else:
            pixels, changes = decode_and_tell(value, LIMITS.max_pixels)
            assert np.array_equal(outcome[0], pixels)
            assert outcome[1] == changes
    assert sum(isinstance(outcome, Broken) for outcome in outcomes) == 4
    assert sum(bool(outcome[1]) for outcome in outcomes if not isinstance(outcome, Broken)) == 2


def test_sounds_are_decoded_there_too() -> None:
    """Catches sounds that arrive with another rate or length, or none."""
    pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setparams((2, 2, 8000, 0, "NONE", ""))
        sound.writeframes(np.arange(-3000, 3000, dtype="<i2").tobytes())
    clip, broken = decode_samples([buffer.getvalue(), b"RIFF"], AUDIO, LIMITS)
    assert np.array_equal(clip[0].samples, decode_audio(buffer.getvalue()).samples)
    assert (clip[0].sample_rate, len(clip[0].samples)) == (8000, 3000)
    assert isinstance(broken, Broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (["segfault"], "the decoder crashed: signal 11 (SIGSEGV)"),
        (["loop"], "took longer than samples.decode_timeout_s = 0.5 s"),
        (["deaf_loop"], "took longer than samples.decode_timeout_s = 0.5 s"),
        (["eat_memory"], "needs more memory to be decoded than 1.0 GiB"),
        (["leave", "3"], "the decoder ended with exit code 3"),
    ],
)
def test_poison_costs_itself_and_is_told(
    how: list[str], reason: str, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a job that dies or hangs of one image, and a neighbour that is lost or blamed for it."""
    monkeypatch.setattr(decoder, "GRACE_S", 0.5)
    values = [png(grey) for grey in range(60)]
    values[41] = poison(*how)
    limits = LIMITS._replace(timeout_s=0.5) if "loop" in how[0] else LIMITS
    outcomes = list(decode_samples(values, IMAGE, limits))
    assert outcomes[41] == Broken(reason)
    assert [o[0][0, 0, 0] for i, o in enumerate(outcomes) if i != 41] == [i for i in range(60) if i != 41]


@pytest.mark.slow
def test_poison_at_the_ends_and_side_by_side(png: Png) -> None:
    """Catches a search for the culprit that goes beyond the group or ends with the first one."""
    bad = poison("segfault")
    outcomes = list(decode_samples([bad, bad, png(1), bad], IMAGE, LIMITS))
    assert [isinstance(o, Broken) for o in outcomes] == [True, True, False, True]
    assert outcomes[2][0][0, 0, 0] == 1


def test_a_decoder_killed_by_others_loses_nothing(png: Png, tmp_path: Path) -> None:
    """Catches a good image that is called broken as the machine was out of memory while it was decoded; results that
    depend on what else runs there."""
    values = [png(1), poison("be_killed_once", str(tmp_path / "flag"), rest=png(2)), png(3)]
    assert [o[0][0, 0, 0] for o in decode_samples(values, IMAGE, LIMITS)] == [1, 2, 3]
    assert (tmp_path / "flag").exists()
    (idle,) = decoder._idle[IMAGE.decoder]
    os.kill(idle.process.pid, signal.SIGKILL)  # between two groups
    assert [o[0][0, 0, 0] for o in decode_samples(values, IMAGE, LIMITS)] == [1, 2, 3]


def test_what_libraries_print_is_no_reply(png: Png) -> None:
    """Catches pixels made of a warning."""
    values = [poison("chatter", rest=png(i)) for i in range(3)]
    assert [o[0][0, 0, 0] for o in decode_samples(values, IMAGE, LIMITS)] == [0, 1, 2]


def test_replies_that_nobody_took_are_not_given_to_the_next(png: Png) -> None:
    """Catches images of one chunk in the next one, after an encoder failed in the midst."""
    first = decode_samples([png(i) for i in range(9)], IMAGE, LIMITS)
    next(first)
    inner = decode_samples([png(77)], IMAGE, LIMITS)  # while another is on its way
    assert next(inner)[0][0, 0, 0] == 77
    assert next(first)[0][0, 0, 0] == 1
    first.close()
    assert [o[0][0, 0, 0] for o in decode_samples([png(99)], IMAGE, LIMITS)] == [99]


def test_the_child_ends_with_its_parent() -> None:
    """Catches decoders that stay on a machine after their job was killed."""
    code = (
        "import time; from mmkt_ray.sandbox import decoding; d = "
        "decoding.Decoder('mmkt_ray.kinds.images:decode_file');print(d.process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.kill()
    for _ in range(500):
        if not Path(f"/proc/{child}").exists() or "(zombie)" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent by five seconds")


def test_no_child_is_an_error_and_no_reject(png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a whole data set that is called broken as no process could be started."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(decoder, "_idle", {})
    with pytest.raises(ResourceError, match="does not start"):
        list(decode_samples([png(1)], IMAGE, LIMITS))


def test_the_child_is_light() -> None:
    """Catches an import of seconds, or of a hundred megabytes, in each process that decodes."""
    code = "import sys, mmkt_ray.sandbox.decoding, mmkt_ray.kinds.images, mmkt_ray.kinds.sounds; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "pyarrow", "pandas", "scipy", "pydantic"} & set(loaded)


@pytest.mark.slow
def test_images_of_one_size_stand_in_their_rows(png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a row that gets another one's image: behind a broken one, after a crash, of another group,
    or of a child beside."""
    monkeypatch.setattr(decoder, "GROUP_SAMPLES", 7)
    values = [png(grey) for grey in range(30)]
    values[3], values[11] = b"", poison("segfault")
    into = np.full((30, 3, 4, 5), 250, np.uint8)
    size = InputSize(4, 5, 2)
    outcomes = list(decode_samples(values, IMAGE, LIMITS, size, into, num_children=2))
    assert [i for i, o in enumerate(outcomes) if isinstance(o, Broken)] == [3, 11]
    whole = list(decode_samples(values, IMAGE, LIMITS))
    for i, (outcome, plain) in enumerate(zip(outcomes, whole, strict=True)):
        if not isinstance(outcome, Broken) and not isinstance(plain, Broken):
            assert np.shares_memory(outcome.value, into[i])
            assert (into[i] == i).all()
            assert outcome.digest == plain.digest


def test_an_image_larger_than_the_shared_memory_arrives(png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an encoder of large images for whose rows there is no room."""
    monkeypatch.setattr(decoder, "ROWS_BYTES", 50)
    into = np.zeros((2, 3, 4, 5), np.uint8)
    list(decode_samples([png(7), png(8)], IMAGE, LIMITS, InputSize(4, 5, 2), into))
    assert [set(row.ravel().tolist()) for row in into] == [{7}, {8}]


def test_whoever_stops_in_between_leaves_no_child_in_the_midst(png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second child's images in the next chunk."""
    monkeypatch.setattr(decoder, "GROUP_SAMPLES", 2)
    first = decode_samples([png(i) for i in range(8)], IMAGE, LIMITS, num_children=2)
    next(first)
    first.close()
    assert [o[0][0, 0, 0] for o in decode_samples([png(98), png(99)], IMAGE, LIMITS)] == [98, 99]
