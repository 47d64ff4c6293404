"""Read the images that Label Studio's tasks name: local files, uploads, data URLs, http(s) and cloud storage.

A request can name any address. So files are read below the given folders alone, and nothing is fetched but from Label
Studio itself and from hosts that are allowed by name, redirects included.
"""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.label_studio import LOCAL, file_name
from lesionsam.utils.images import read_image

UPLOAD = "/data/upload/"
CLOUD = ("s3://", "gs://", "azure-blob://")
MAX_BYTES = 256 << 20  # of a fetched image
SECONDS = 30  # to wait for an answer
MAX_REDIRECTS = 4


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        return None  # each hop is checked by `ImageSources._fetch`


@dataclass(frozen=True)
class ImageSources:
    """Hold the places that images may come from.

    Attributes:
        local_root: what Label Studio knows as LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT. upload_root: folder `upload` in
            Label Studio's media folder. None: such files are fetched from `url`, if that is given.
        url: of Label Studio. api_key: of a user there; a legacy token, or a personal access token.
        hosts: others to fetch from, as HOST or HOST:PORT.
    """

    local_root: Path | None = None
    upload_root: Path | None = None
    url: str = ""
    api_key: str = ""
    hosts: Sequence[str] = ()

    def read(self, address: str, task_id: object) -> np.ndarray:
        """Return the image at an address of a task's data, (H, W, 3) uint8 RGB.

        Raises:
            UserError: an address that may not be read, or no image there; names the option that allows it.
        """
        if address.startswith("data:"):
            return _decode(_data_bytes(address), "data URL")
        if self.url and _origin(address) == _origin(self.url):
            parts = urllib.parse.urlsplit(address)
            address = address.removeprefix(f"{parts.scheme}://{parts.netloc}")
        if address.startswith(LOCAL) and self.local_root is not None:
            return _below(self.local_root, file_name({"image": address}, "task"), address)
        if address.startswith(UPLOAD) and self.upload_root is not None:
            path = urllib.parse.unquote(address.removeprefix(UPLOAD).partition("?")[0])
            return _below(self.upload_root, path, address)
        if address.startswith(CLOUD):
            if not self.url:
                raise UserError(
                    f"{address}: cloud storage is read through Label Studio; give --url and LABEL_STUDIO_API_KEY, or "
                    "use presigned addresses and --allow-host"
                )
            uri = base64.urlsafe_b64encode(address.encode()).decode()
            task = urllib.parse.quote(str(task_id), safe="")
            return _decode(self._fetch(f"{self.url.rstrip('/')}/tasks/{task}/resolve/?fileuri={uri}"), address)
        if address.startswith("/"):
            if not self.url:
                option = {LOCAL: "--local-root", UPLOAD: "--upload-root"}
                named = next((text for start, text in option.items() if address.startswith(start)), "")
                raise UserError(f"{address}: a file of Label Studio; give {named + ' or ' if named else ''}--url")
            return _decode(self._fetch(self.url.rstrip("/") + address), address)
        return _decode(self._fetch(address), address.partition("?")[0])  # the query may hold a signature

    def _fetch(self, address: str) -> bytes:
        opener = urllib.request.build_opener(_NoRedirect)
        place = address.partition("?")[0]
        for _ in range(MAX_REDIRECTS + 1):
            is_ours = bool(self.url) and _origin(address) == _origin(self.url)
            self._check_host(address, is_ours)
            headers = self._authorization(opener) if is_ours else {}
            request = urllib.request.Request(address, headers=headers)  # noqa: S310  # checked above
            try:
                with opener.open(request, timeout=SECONDS) as answer:  # nosec B310
                    data = answer.read(MAX_BYTES + 1)
                if len(data) > MAX_BYTES:
                    raise UserError(f"{place}: more than {MAX_BYTES >> 20} MB; expected an image")
                return data
            except urllib.error.HTTPError as error:
                target = error.headers.get("Location")
                if error.code not in (301, 302, 303, 307, 308) or not target:
                    raise UserError(f"{place}: the server answers {error.code} {error.reason}") from None
                address = urllib.parse.urljoin(address, target)
            except (OSError, ValueError) as error:
                reason = getattr(error, "reason", error)
                raise UserError(f"{place}: cannot be fetched: {reason}") from None
        raise UserError(f"{place}: redirected more than {MAX_REDIRECTS} times")

    def _check_host(self, address: str, is_ours: bool) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{address.partition('?')[0][:200]}: expected a file of Label Studio, a data URL, or an http(s) or s3 "
                "address"
            )
        if not is_ours and parts.netloc not in self.hosts and parts.hostname not in self.hosts:
            raise UserError(f"{parts.netloc}: not allowed to be fetched from; --allow-host {parts.netloc} allows it")

    def _authorization(self, opener: urllib.request.OpenerDirector) -> dict[str, str]:
        if not self.api_key:
            return {}
        if self.api_key.count(".") != 2:  # a legacy token, used as it is
            return {"Authorization": f"Token {self.api_key}"}
        request = urllib.request.Request(  # noqa: S310  # the URL of --url
            f"{self.url.rstrip('/')}/api/token/refresh",
            json.dumps({"refresh": self.api_key}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with opener.open(request, timeout=SECONDS) as answer:  # nosec B310
                return {"Authorization": f"Bearer {json.loads(answer.read(1 << 16))['access']}"}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.url}: refuses the personal access token in LABEL_STUDIO_API_KEY") from None


def _origin(address: str) -> tuple[str, str]:
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:
        return "", ""
    return parts.scheme, parts.netloc.lower()


def _below(root: Path, name: str, address: str) -> np.ndarray:
    """Read an image below a folder, links followed.

    Raises:
        UserError: the path leads out of the folder, or holds no image.
    """
    root = root.resolve()
    try:
        path = (root / name.lstrip("/")).resolve()
    except (OSError, ValueError):  # a loop of links, a NUL
        path = Path("/")
    if not path.is_relative_to(root):
        raise UserError(f"{address}: leads out of the folder that may be read")
    try:
        return read_image(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), address)) from None


def _data_bytes(address: str) -> bytes:
    head, _, body = address.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError):
        return b""


def _decode(data: bytes, place: str) -> np.ndarray:
    if not data:
        raise UserError(f"{place}: empty, or not base64; expected an image")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        try:
            return read_image(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), place)) from None
