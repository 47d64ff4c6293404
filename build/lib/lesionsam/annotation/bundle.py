"""The page's JavaScript from its TypeScript: `make web`. What is shipped names the sources it was made from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from lesionsam.errors import UserError, run_guarded
from lesionsam.utils.files import write_bytes_atomic

WEB = Path(__file__).parent / "web"
BUNDLE = "annotate.js"


def sources_digest(folder: Path = WEB) -> str:
    """SHA-256 over names and contents of the TypeScript files and their settings, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.ts"), folder / "tsconfig.json"]):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def banner(digest: str) -> str:
    """First line of the bundle."""
    return f'// Made by "make web" from the TypeScript files beside it, of SHA-256 {digest}; change those, not this.'


def compile_page(tools: Path, folder: Path = WEB) -> bytes:
    """Check the types and bundle.

    Args:
        tools: folder whose node_modules hold typescript and esbuild.
    Raises:
        UserError: no tools there, or TypeScript that is wrong.
    """
    tsc, esbuild = (tools / "node_modules" / ".bin" / name for name in ("tsc", "esbuild"))
    for tool in (tsc, esbuild):
        if not tool.exists():
            raise UserError(f"{tool}: not there; `make web` fetches it")
    bundle = [
        str(esbuild),
        str(folder / "main.ts"),
        "--bundle",
        "--format=iife",
        "--target=es2021",
        "--charset=utf8",
        "--legal-comments=none",
        "--log-level=warning",
    ]
    made = b""
    for command in ([str(tsc), "-p", str(folder / "tsconfig.json")], bundle):
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise UserError(f"the page does not compile: {(done.stdout + done.stderr).decode(errors='replace')[:2000]}")
        made = done.stdout
    return banner(sources_digest(folder)).encode() + b"\n" + made


def main() -> None:
    """`python -m lesionsam.annotation.bundle TOOLS`."""
    if len(sys.argv) != 2:
        raise UserError("expected the folder whose node_modules hold typescript and esbuild")
    made = compile_page(Path(sys.argv[1]))
    write_bytes_atomic(WEB / BUNDLE, made)
    print(f"{WEB / BUNDLE}: {len(made) / 1000:.0f} kB")


if __name__ == "__main__":
    run_guarded(main)
