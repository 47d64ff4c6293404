"""Run `lesionsam annotate`: open the table, serve the page, close; one process per table of boxes."""

from __future__ import annotations

import errno
import getpass
import ipaddress
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from lesionsam.annotation.catalogue import Catalogue
from lesionsam.annotation.gate import Gate, is_loopback
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.records import MAX_NAME
from lesionsam.annotation.server import Desk, create_app
from lesionsam.annotation.store import Store
from lesionsam.errors import UserError
from lesionsam.utils.locks import file_lock
from lesionsam.utils.progress import working

PORT = 8350  # tried first; any free one where it is taken


def annotate(
    images: Sequence[str | Path],
    *,
    boxes: Path | None = None,
    model: Path | None = None,
    threshold: float = 0.5,
    port: int | None = None,
    host: str = "127.0.0.1",
    browser: bool = True,
    who: str = "",
    device: str = "cpu",
) -> None:
    """Serve the page until it is interrupted.

    Args:
        images: folders, files, patterns. boxes: the two-box CSV; boxes.csv beside the first folder if None.
        model: weights of a SAM. threshold: probability above which a pixel is lesion.
        port: None = `PORT`, or any free one. host: address to listen on; others than loopback get a token.
        browser: open it. who: name of the annotator; the login name if empty. device: of the model.
    Raises:
        UserError: no images, a table that cannot be read or is open already, weights or a port that cannot be used.
    """
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: expected a probability between 0 and 1, got {threshold:g}")
    catalogue = Catalogue(images)
    table = boxes or default_table(Path(images[0]))
    if table.is_dir():
        raise UserError(f"--boxes: {table} is a folder; expected a CSV file, such as {table / 'boxes.csv'}")
    with file_lock(table.parent / f".{table.name}.lock", f"annotation of {table}"):
        store, pictures = Store(table, catalogue), Pictures()
        desk = Desk(catalogue, store, pictures, None, who or login_name(), _title(images))
        if model is not None:
            with working("loading the model"):
                add_model(desk, model, threshold, device)
        elif has_text_proposals(table):
            add_text_proposals(desk)
        try:
            _serve(desk, host, port, browser)
        finally:
            if desk.review is not None:
                desk.review.stop()


def add_model(desk: Desk, weights: Path, threshold: float, device: str = "cpu") -> None:
    """Load a model and start its proposals; imports torch, which a page without a model does not need."""
    from lesionsam.annotation.model import Model
    from lesionsam.annotation.review import Review

    desk.model = Model(weights, desk.pictures, threshold=threshold, device=device)
    desk.review = Review(desk.catalogue, desk.store, desk.pictures, desk.model)
    desk.review.start()


def has_text_proposals(table: Path) -> bool:
    """Return whether `lesionsam propose` has left proposals beside a table."""
    path = table.with_name(f"{table.stem}.proposals.jsonl")  # as `review.proposals_path`, which imports torch
    return path.is_file() and b'{"model": "text", ' in path.read_bytes()


def add_text_proposals(desk: Desk) -> None:
    """Show what `lesionsam propose` has found; see `add_model`."""
    from lesionsam.annotation.review import Review

    desk.review = Review(desk.catalogue, desk.store, desk.pictures, None)


def default_table(images: Path) -> Path:
    """Return boxes.csv beside a folder of images (own/images -> own/boxes.csv), or beside a file."""
    folder = images if images.is_dir() else Path(str(images).split("*")[0] + "x").parent
    return folder.resolve().parent / "boxes.csv" if images.is_dir() else folder / "boxes.csv"


def _title(images: Sequence[str | Path]) -> str:
    """Return the page's title: the end of the first path."""
    name = "/".join(Path(images[0]).resolve().parts[-2:])
    return name if len(images) == 1 else f"{name} and {len(images) - 1} more"


def login_name() -> str:
    """Return the user's login name, or "annotator"."""
    try:
        return getpass.getuser()[:MAX_NAME]
    except (OSError, KeyError, ImportError):
        return "annotator"


def listen(host: str, port: int | None) -> socket.socket:
    """Open a socket at `port`, or, if that is None, at `PORT` or any free port.

    Raises:
        UserError: the port is taken, not allowed, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    tried = [PORT, 0] if port is None else [port]
    for number in tried:
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
            found.listen(128)
            return found
        except (OSError, OverflowError) as error:
            found.close()
            code = getattr(error, "errno", None)
            if code == errno.EADDRINUSE and number != tried[-1]:
                continue
            if code == errno.EADDRINUSE:
                raise UserError(
                    f"--port: {number} is in use by another program (another page?); choose another, or "
                    "leave --port out to get a free one"
                ) from None
            raise UserError(
                f"--host, --port: cannot listen on {host} port {number}: {error}; expected an address of "
                "this machine and a port of 1024 to 65535"
            ) from None
    raise UserError("--port: no free port")


def _serve(desk: Desk, host: str, port: int | None, browser: bool) -> None:
    listener = listen(host, port)
    number = listener.getsockname()[1]
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    shown = host if is_loopback(host) else _address(host)
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{number}/" + (f"?token={token}" if token else "")
    if token:
        print(
            f"warning: {host} lets other machines ask for these images, without encryption. Only who has the address "
            "below gets in; give it to nobody else, and use it on a network that you trust.",
            file=sys.stderr,
        )
    gate = Gate(create_app(desk), host=host, port=number, token=token)
    config = uvicorn.Config(
        gate,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=16384,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    count = len(desk.catalogue)
    print(
        f"{count} image{'s' if count != 1 else ''}, boxes in {desk.store.path}\n"
        f"the page: {url}\nCtrl-C ends it; every change is saved as it is made.",
        flush=True,
    )
    if browser and _has_screen():
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print(f"closed; everything is in {desk.store.path}")
    finally:
        listener.close()


def _address(host: str) -> str:
    """Return the host to type on another machine, also for a server that listens on all addresses."""
    try:
        return socket.gethostname() if ipaddress.ip_address(host).is_unspecified else host
    except ValueError:
        return host


def _has_screen() -> bool:
    """Return whether a browser can open a window; a text browser would take over the terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
