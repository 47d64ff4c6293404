"""Time the annotation page: `python benchmarks/annotation.py IMAGES [--model WEIGHTS]`; a minute.

A server of its own over real images: masks after drags with the next images encoded ahead, as the page asks for them;
the next image; a save; and how soon a folder of many images is open. Prints a Markdown table by the clock and, since
other work on the machine lengthens that, in the server's processor time; ends with an error where a limit is missed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

MEDIAN_LIMIT, P95_LIMIT, NEXT_LIMIT, OPEN_LIMIT = 0.100, 0.200, 0.100, 1.0  # seconds
AHEAD, DRAGS = 3, 6  # images made ready before they are asked for, as the page does; drags on each
DRAG, NEXT, SAVE = "masks after a drag", "next image, its picture fetched ahead", "a save, on disk"
PAUSE = 0.5  # seconds that a person looks at an image before the first drag


@dataclass
class Server:
    """A running `lesionsam annotate`: its process and a client, and what its requests took.

    Attributes:
        clock: kind of request -> seconds of each. processor: kind -> the server's processor seconds, all together.
        late: masks that came without the model's, as the image was not encoded yet.
    """

    process: subprocess.Popen[str]
    client: httpx.Client
    clock: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    late: int = 0

    def used(self) -> float:
        """Return the processor seconds that the server has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Time what happens in the block."""
        used, begun = self.used(), time.perf_counter()
        yield
        self.note(kind, time.perf_counter() - begun, self.used() - used)

    def note(self, kind: str, seconds: float, processor: float) -> None:
        """Count one more of a kind."""
        self.clock.setdefault(kind, []).append(seconds)
        self.processor[kind] = self.processor.get(kind, 0.0) + processor


@contextmanager
def serving(images: Path, table: Path, model: Path | None) -> Iterator[tuple[Server, float]]:
    """Yield the server and the seconds until it printed its page's address."""
    command = [
        sys.executable,
        "-m",
        "lesionsam",
        "annotate",
        str(images),
        "--boxes",
        str(table),
        "--no-browser",
        "--port",
        "0",
        *(["--model", str(model)] if model else []),
    ]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            if found := re.search(r"the page: (\S+)", line):
                with httpx.Client(base_url=found[1].rstrip("/"), timeout=60) as client:
                    yield Server(process, client), time.perf_counter() - begun
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


def drag_about(server: Server, num_images: int, seed: int) -> None:
    """Look at images one after the other and draw on each, making the next ones ready as the page does."""
    rng, client = np.random.default_rng(seed), server.client
    keys = [row[0] for row in client.get("/api/session").json()["images"]][:num_images]
    client.post("/api/prepare", json={"keys": keys[:AHEAD]})
    time.sleep(2.0)
    for k, key in enumerate(keys):
        with server.timed(NEXT):
            size = client.get(f"/api/images/{key}").json()
        for each in keys[k + 1 : k + 1 + AHEAD]:
            client.get(f"/api/images/{each}/picture")
        client.post("/api/prepare", json={"keys": keys[k + 1 : k + 1 + AHEAD]})
        time.sleep(PAUSE)
        for _ in range(DRAGS):
            low, high = rng.uniform(0.1, 0.3, 2), rng.uniform(0.6, 0.9, 2)
            core = [*(low + (high - low) * 0.35), *(low + (high - low) * 0.65)]
            scale = [size["width"], size["height"]] * 2
            big, small = ([round(v * s, 2) for v, s in zip(box, scale, strict=True)] for box in ((*low, *high), core))
            with server.timed(DRAG):
                answer = client.post(f"/api/images/{key}/preview", json={"big": big, "small": small}).json()
            server.late += answer["pending"]
        body = {
            "base": size["state"]["revision"],
            "change": f"b{k}",
            "lesions": [{"id": "0", "big": big, "small": small}],
        }
        with server.timed(SAVE):
            client.put(f"/api/images/{key}", json=body).raise_for_status()


def many(folder: Path, source: Path, count: int) -> Path:
    """Make a folder of `count` names for one image."""
    folder.mkdir()
    for k in range(count):
        os.link(source, folder / f"im{k:05d}{source.suffix}")
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--model", type=Path, default=Path("foundation/compact.safetensors"), help="weights")
    parser.add_argument("--num-images", type=int, default=30, help="that are drawn on")
    parser.add_argument("--count", type=int, default=10_000, help="images of the large folder")
    parser.add_argument("--seed", type=int, default=0, help="of the boxes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        with serving(options.images, Path(scratch, "boxes.csv"), options.model) as (server, _):
            drag_about(server, options.num_images, options.seed)
        first = min(path for path in options.images.iterdir() if path.is_file())
        copy = Path(scratch, f"one{first.suffix}")
        copy.write_bytes(first.read_bytes())
        for count in (1, options.count):
            folder = many(Path(scratch, f"of-{count}"), copy, count)
            with serving(folder, Path(scratch, f"of-{count}.csv"), None) as (opened, seconds):
                server.note(f"start to address, {count} images", seconds, opened.used())
                with opened.timed(kind := f"list of {count} images"):
                    opened.client.get("/api/session").raise_for_status()
                server.note(kind, opened.clock[kind][0], opened.processor[kind])
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| | requests | median | 95 % | server's processor, mean |\n|---|---|---|---|---|")
    for kind, values in server.clock.items():
        cells = np.median(values), np.quantile(values, 0.95), server.processor[kind] / len(values)
        print(f"| {kind} | {len(values)} | " + " | ".join(f"{1e3 * cell:.0f} ms" for cell in cells) + " |")
    print(f"\n{server.late} of {len(server.clock[DRAG])} answers came before the image was encoded")
    opening = [
        sum(server.clock[kind][0] for kind in server.clock if kind.endswith(f" {count} images"))
        for count in (1, options.count)
    ]
    found = {
        DRAG: (np.median(server.clock[DRAG]), MEDIAN_LIMIT),
        f"{DRAG}, 95 %": (np.quantile(server.clock[DRAG], 0.95), P95_LIMIT),
        NEXT: (np.median(server.clock[NEXT]), NEXT_LIMIT),
        f"what {options.count} images add to opening": (opening[1] - opening[0], OPEN_LIMIT),
    }
    missed = {name: values for name, values in found.items() if values[0] > values[1]}
    for name, (value, limit) in found.items():
        print(f"{name}: {1e3 * value:.0f} ms, limit {1e3 * limit:.0f} ms{', missed' if name in missed else ''}")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
