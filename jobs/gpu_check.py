"""What a GPU does with this library, measured on a bare machine: without Ray, in under 8 minutes.

    python jobs/gpu_check.py --out gpu.json --data FOLDER     FOLDER has cifar10/; without it images are synthetic
    python jobs/gpu_check.py --small --seconds 0.2            a try on a CPU

Needs torch; torchvision for the large networks and for nvJPEG; for `population` also what a config and a table of
features need (pydantic, pyyaml, pyarrow, scipy, safetensors, xxhash). What is missing is told and left out. Every
part compares what the device gave with what this machine's CPU gives in float32.
A part that fails is reported, and the others go on. Parts:

    networks     forward-only limits, and what an encoder's step reaches of them with prepared chunks (aim 0.9)
    decode       JPEG photos decoded per second, on one core and by nvJPEG
    population   1,024 heads in one stack against one by one (aim 20 times)
    pretraining  a small CNN to 94 % on CIFAR-10 (aim 10 s)
    compile      what torch.compile would add to the limits
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file lies in

from gpu_check_measuring import CPU, TOLERANCE, Check, LeftOut, agreement, package, rate, reported
from gpu_check_training import measure_population, measure_pretraining

from mmkt_ray.encoders.cnn import SmallCNN
from mmkt_ray.encoders.device import Forward, autocast, normalised

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TOTAL_S = 360.0  # after that no part begins
Apply = Callable[[Tensor], Tensor]


# --- networks: limits, and an encoder's step --------------------


class Backbone(nn.Module):
    """A torchvision network without its last layer, over uint8 images (B, 3, S, S)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = getattr(package("torchvision.models"), name)(weights=None)
        head = "heads" if hasattr(self.network, "heads") else "fc"
        setattr(self.network, head, nn.Identity())

    def features(self, x: Tensor) -> Tensor:
        return self.network(normalised(x, MEAN, STD))


def build(name: str) -> Any:
    """A network with random weights, the same each time. Raises: LeftOut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallCNN(10) if name == "small_cnn" else Backbone(name)
        if isinstance(network, SmallCNN):
            network.fit_whitening(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def networks_of(check: Check) -> dict[str, tuple[int, int, int]]:
    """Name -> side, images of a pass, images of a chunk."""
    if check.small:
        return {"small_cnn": (32, 4, 8), "resnet18": (32, 2, 4)}
    return {
        "small_cnn": (32, 1024, 8192),
        "resnet18": (224, 256, 1024),
        "resnet50": (224, 256, 1024),
        "vit_b_16": (224, 256, 1024),
    }


def eager(function: Apply, x: Tensor) -> Callable[[], Tensor]:
    """A pass, kernel by kernel."""

    def call() -> Tensor:
        with torch.inference_mode(), autocast(x.device, "bf16"):
            return function(x)

    return call


def as_graph(check: Check, function: Apply, x: Tensor) -> Callable[[], Any]:
    """A pass as a CUDA graph."""
    call, stream = eager(function, x), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    check.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_networks(check: Check) -> dict[str, Any]:
    asked = networks_of(check)
    return {name: reported(measure_network, check, name, check.seconds / len(asked)) for name in asked}


def measure_network(check: Check, name: str, seconds: float) -> dict[str, Any]:
    """Images per second: of passes alone, over images that lie on the device,
    and of whole chunks from the host's memory."""
    side, size, rows = networks_of(check)[name]
    chunks = np.random.default_rng(0).integers(0, 256, (2, rows, 3, side, side), dtype=np.uint8)
    network = build(name)
    sample = chunks[0][: min(8, rows)]
    expected = Forward(network.features, CPU, "fp32", len(sample))(sample)
    network.to(check.device)
    x = torch.from_numpy(chunks[0][:size]).to(check.device)
    found: dict[str, Any] = {"eager": rate(check, eager(network.features, x), size, seconds / 5)}
    if check.is_gpu:
        found["cuda_graph"] = rate(check, as_graph(check, network.features, x), size, seconds / 5)
    found["limit"] = max(found.values())
    for precision in TOLERANCE:
        got = Forward(network.features, check.device, precision, size)(chunks[0])[: len(sample)]
        found[f"differs_{precision}"] = agreement(got, expected, TOLERANCE[precision])
    forward = Forward(network.features, check.device, "bf16", size)
    found["step"] = rate_of_chunks(forward, chunks, seconds / 5, in_flight=1)
    found["step_two_in_flight"] = rate_of_chunks(forward, chunks, seconds / 5, in_flight=2)
    found["fraction"] = found["step_two_in_flight"] / found["limit"]
    idle = Forward(lambda y: y[:, 0, 0, :1].float(), check.device, "fp32", size)
    found["step_without_network"] = rate_of_chunks(idle, chunks, seconds / 5, in_flight=2)
    return found


def rate_of_chunks(forward: Forward, chunks: np.ndarray, seconds: float, in_flight: int) -> float:
    """Rows of chunks per second, so many threads giving chunks to one Forward."""
    forward(chunks[0])
    start = time.perf_counter()

    def work(_: int) -> int:
        done = 0
        while time.perf_counter() - start < seconds or not done:
            done += len(forward(chunks[done // len(chunks[0]) % 2]))
        return done

    with ThreadPoolExecutor(in_flight) as pool:
        done = sum(pool.map(work, range(in_flight)))
    return done / (time.perf_counter() - start)


def measure_compile(check: Check) -> dict[str, Any]:
    """Compiled passes of ResNet-50 and the small CNN; seconds until the first one is done."""
    if not check.is_gpu:
        raise LeftOut("measured on a GPU alone")
    return {name: reported(measure_compiled, check, name, check.seconds / 8) for name in ("small_cnn", "resnet50")}


def measure_compiled(check: Check, name: str, seconds: float) -> dict[str, Any]:
    side, size, _ = networks_of(check).get(name, (64, 4, 8))
    network = build(name).to(check.device)
    x = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=check.device)
    start, call = time.perf_counter(), eager(torch.compile(network.features), x)
    got = call().float().cpu().numpy()
    first = time.perf_counter() - start
    expected = eager(network.features, x)().float().cpu().numpy()
    return {
        "differs_from_eager": agreement(got, expected, TOLERANCE["bf16"]),
        "first_s": first,
        "images_per_s": rate(check, call, size, seconds),
        "cuda_graph": rate(check, as_graph(check, torch.compile(network.features), x), size, seconds),
    }


# --- decode --------------------


def photos(num: int) -> list[bytes]:
    """JPEG files of 640 x 480 pixels, smooth with some noise, about 100 kB each. Raises: LeftOut."""
    image, rng, files = package("PIL.Image"), np.random.default_rng(0), []
    for _ in range(num):
        small = image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (640, 480), image.Resampling.BICUBIC
        )
        noisy = np.asarray(small, np.int16) + rng.normal(0, 8, (480, 640, 3)).astype(np.int16)
        out = io.BytesIO()
        image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        files.append(out.getvalue())
    return files


def decoders() -> Iterator[tuple[str, Callable[[bytes], np.ndarray]]]:
    """Those that are installed, each to pixels (H, W, 3)."""
    image = package("PIL.Image")
    yield "pillow", lambda data: np.asarray(image.open(io.BytesIO(data)).convert("RGB"))
    for name, build_decoder in (
        ("simplejpeg", lambda module: lambda data: module.decode_jpeg(data)),
        ("torchvision.io", lambda module: lambda data: module.decode_jpeg(as_tensor(data)).permute(1, 2, 0).numpy()),
        ("mmkt_ray.kinds.images", lambda module: lambda data: module.decode_image(data, 10**7)),
    ):
        try:
            yield name, build_decoder(package(name))
        except LeftOut:
            continue


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def measure_decode(check: Check) -> dict[str, Any]:
    """Photos of 640 x 480 per second and core, full size; and by nvJPEG, many at once."""
    files, threads = photos(2 if check.small else 64), torch.get_num_threads()
    found: dict[str, Any] = {"photo_bytes": sum(map(len, files)) // len(files), "cores": os.cpu_count()}
    exact: np.ndarray | None = None
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's own of its successor
            for name, decode in decoders():
                pixels = decode(files[0]).astype(np.float32)
                exact = pixels if exact is None else exact
                found[f"differs_{name}"] = agreement(pixels, exact, 0.02)
                work = partial(lambda decode: [decode(f) for f in files], decode)
                found[name] = rate(replace(check, device=CPU), work, len(files), check.seconds / 10)
            found["nvjpeg"] = reported(measure_nvjpeg, check, files, exact)
    finally:
        torch.set_num_threads(threads)
    return found


def measure_nvjpeg(check: Check, files: list[bytes], exact: np.ndarray) -> dict[str, Any]:
    """Photos per second by the GPU."""
    if not check.is_gpu:
        raise LeftOut("measured on a GPU alone")
    io_module, given = package("torchvision.io"), [as_tensor(data) for data in files]
    pixels = io_module.decode_jpeg(given[:1], device=check.device)[0].permute(1, 2, 0).cpu().numpy().astype(np.float32)
    differs = agreement(pixels, exact, 0.02)
    call = lambda: io_module.decode_jpeg(given, device=check.device)  # noqa: E731
    return {"differs": differs, "images_per_s": rate(check, call, len(files), check.seconds / 10)}


# --- the whole --------------------

PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "networks": measure_networks,
    "decode": measure_decode,
    "population": measure_population,
    "pretraining": measure_pretraining,
    "compile": measure_compile,
}


def failures(found: Any) -> list[str]:
    """Of a result and of what is in it."""
    if not isinstance(found, dict):
        return []
    return [found["failed"]] if "failed" in found else [why for value in found.values() for why in failures(value)]


def machine(check: Check) -> dict[str, Any]:
    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    about["device"] = check.device.type
    if check.is_gpu:
        card = torch.cuda.get_device_properties(0)
        about |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}", "gpu_bytes": card.total_memory}
    return about


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--out", type=Path, help="JSON file, written after each part")
    parser.add_argument("--data", type=Path, help="folder with cifar10/")
    parser.add_argument("--seconds", type=float, default=50.0, help="of each part, about")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--cpu", action="store_true", help="though there is a GPU")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    gpu = torch.cuda.is_available() and not args.cpu
    check = Check(torch.device("cuda" if gpu else "cpu"), args.seconds, args.small, args.data)
    found: dict[str, Any] = {"machine": machine(check), "small": check.small, "parts": {}}
    begin = time.perf_counter()
    for name in args.parts or PARTS:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        late = start - begin > TOTAL_S
        result: dict[str, Any] = {"left_out": "no time was left"} if late else reported(PARTS[name], check)
        result["part_s"] = time.perf_counter() - start
        result["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if gpu:
            result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        found["parts"][name] = result
        print(json.dumps({name: result}, default=float), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1, default=float))
    return 1 if failures(found["parts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
