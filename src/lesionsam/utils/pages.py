"""Fill HTML templates, and hold pictures inside a page, so that it opens offline."""

from __future__ import annotations

import base64
import io
from importlib import resources

import jinja2
from PIL import Image


def render(package: str, name: str, **content: object) -> str:
    """Return `templates/name` of a package filled with content, escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (resources.files(package) / "templates" / name).read_text(encoding="utf-8")
    return environment.from_string(source).render(**content)


def data_uri(data: bytes, kind: str) -> str:
    """Return bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg_uri(picture: Image.Image, quality: int) -> str:
    """Return a picture as a JPEG in a data URI."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality)
    return data_uri(buffer.getvalue(), "image/jpeg")
