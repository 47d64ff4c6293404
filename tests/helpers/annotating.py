"""The annotation page's server for tests: real uvicorn on a free port, in this process or in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.gate import Gate
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.serve import add_model, listen
from lesionsam.annotation.server import Desk, create_app
from lesionsam.annotation.store import Store

SIZE = (320, 240)
SECONDS = 60.0  # that a start may take on a busy machine
BIG, SMALL = [80.0, 60.0, 240.0, 180.0], [130.0, 100.0, 190.0, 140.0]


def draw_images(folder: Path, names: Sequence[str], size: tuple[int, int] = SIZE) -> None:
    """A dark ellipse on skin in each image, a little elsewhere in each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    for k, name in enumerate(names):
        u, v = x / size[0] - 0.5 - 0.02 * (k % 5), y / size[1] - 0.5
        inside = (u / 0.2) ** 2 + (v / 0.22) ** 2 < 1
        pixels = np.where(inside[..., None], (115, 70, 60), (205, 165, 145)) + rng.normal(0, 4, (size[1], size[0], 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")


@dataclass
class Served:
    """A running server: what it serves and a client that speaks to it."""

    url: str
    desk: Desk
    client: httpx.Client

    def key(self, image_id: str) -> str:
        """Of an image."""
        return self.desk.catalogue.by_id[image_id].key

    def save(
        self, image_id: str, base: int, change: str, lesions: Sequence[dict[str, Any]] = (), **rest: Any
    ) -> httpx.Response:
        """One change, as the page sends it."""
        body = {"base": base, "change": change, "who": "ann", "lesions": list(lesions), **rest}
        return self.client.put(f"/api/images/{self.key(image_id)}", json=body)


def sent(
    lesion_id: str = "0", big: Sequence[float] = BIG, small: Sequence[float] = SMALL, **rest: Any
) -> dict[str, Any]:
    """A lesion as the page sends it."""
    return {"id": lesion_id, "big": list(big), "small": list(small), **rest}


@contextmanager
def serving(
    folder: Path, *, weights: Path | None = None, host: str = "127.0.0.1", token: str | None = None
) -> Iterator[Served]:
    """The server over folder/images and folder/boxes.csv, in a thread."""
    catalogue, pictures = Catalogue([folder / "images"]), Pictures()
    desk = Desk(catalogue, Store(folder / "boxes.csv", catalogue), pictures, None, "ann", folder.name)
    if weights is not None:
        add_model(desk, weights, 0.5)
    server, thread, listener = None, None, listen("127.0.0.1", 0)
    try:
        port = listener.getsockname()[1]
        gate = Gate(create_app(desk), host=host, port=port, token=token)
        server = uvicorn.Server(uvicorn.Config(gate, log_level="warning", access_log=False, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + SECONDS
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=SECONDS) as client:
            yield Served(url, desk, client)
    finally:  # whatever happened: no thread goes on into the next test
        if desk.review is not None:
            desk.review.stop()
        if server is not None and thread is not None:
            server.should_exit = True
            thread.join(10)
        listener.close()


@contextmanager
def command(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lesionsam annotate` as a process of its own, and the address it printed; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lesionsam", "annotate", *map(str, arguments), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        said = ""
        while process.stdout is not None and (line := process.stdout.readline()):
            said += line
            if found := re.search(r"the page: (\S+)", line):
                yield process, found[1].rstrip("/")
                return
        raise AssertionError(f"no page: {said}")
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
