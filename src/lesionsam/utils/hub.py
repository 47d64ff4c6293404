"""Fetch models of the Hugging Face Hub and push them there; read what a folder in its form says about itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lesionsam.errors import UserError

CONFIG = "config.json"
NOTES = "lesionsam"  # key of config.json under which an export keeps the metadata of its weights
WEIGHTS = (".safetensors", ".pth")
FILES = ["*.json", "*.safetensors", "README.md"]


def model_type_of(folder: Path) -> str:
    """Return model_type of a folder's config.json.

    Raises:
        UserError: no such file, or no readable one.
    """
    path = folder / CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a model in the form of the Hugging Face Hub") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: states no model_type ({error}); fetch it again") from None


def notes_of(folder: Path) -> dict[str, str]:
    """Return the metadata that an export of this project left in config.json; empty for any other model."""
    try:
        notes = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(NOTES, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {str(key): str(value) for key, value in notes.items()} if isinstance(notes, dict) else {}


def is_hub_name(place: str | Path) -> bool:
    """Return whether a name may be OWNER/NAME of the Hub: no path, and its first part no folder here."""
    text = str(place)
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text))
        and Path(text).suffix not in WEIGHTS
        and not Path(text).parts[0].startswith(".")
        and (not Path(text).parent.is_dir())
    )


@dataclass(frozen=True)
class Fetched:
    """A model that lies in a folder.

    Attributes:
        facts: of its origin: revision (the commit), licence; what is unknown is left out.
    """

    folder: Path
    facts: dict[str, str]


def fetch_model(place: str, revision: str = "main", *, key: str = "--model") -> Fetched:
    """Return the folder of a model: `place` itself, or its files fetched from the Hub into the Hub's own cache.

    An interrupted download is resumed by the next call. Without a network the cached files are used.

    Args:
        place: a folder with config.json, or OWNER/NAME. revision: branch, tag or commit.
        key: parameter or option that names it, for messages.
    Raises:
        UserError: no such model or revision, access that is not granted, no network, no weights as safetensors.
    """
    if Path(place).is_dir():
        model_type_of(Path(place))
        return Fetched(Path(place), {})
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.utils import httpx

    try:
        folder = Path(snapshot_download(place, revision=revision, allow_patterns=FILES))
    except errors.GatedRepoError:
        raise UserError(
            f"{key}: access to {place} must be granted: accept its licence at "
            f"{constants.ENDPOINT}/{place}, then log in with `hf auth login` (or set HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{key}: {constants.ENDPOINT}/{place} does not exist, or is private, and no file or folder of that name "
            "is here; check the name, or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: {place} has no branch, tag or commit {revision!r}") from None
    except errors.HFValidationError:
        raise UserError(f"{key}: no folder {place}, and no name of a model of the Hub (OWNER/NAME); check it") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{key}: {place} is not in the cache and {constants.ENDPOINT} cannot be reached; connect once, or "
            "name a folder that holds it"
        ) from None
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{key}: {place} could not be fetched ({reason}); run again, it resumes") from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{key}: {place} holds no weights as safetensors; name a file of weights instead")
    facts = {"revision": folder.name}
    if licence := _licence(folder / "README.md"):
        facts["licence"] = licence
    return Fetched(folder, facts)


def _licence(card: Path) -> str:
    """Return the licence that a model card states; empty without one."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(card).data if card.is_file() else None
    except (ValueError, OSError):
        return ""
    return str(getattr(data, "license_name", None) or getattr(data, "license", None) or "")


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as a model of the Hub; return its address.

    Args:
        name: OWNER/NAME; made where it does not exist.
    Raises:
        UserError: no login, no right to write, no network, a name that the Hub does not take.
    """
    from huggingface_hub import HfApi, constants, errors
    from huggingface_hub.utils import httpx

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights adapted by LesionSAM")
    except errors.HFValidationError:
        raise UserError(f"--push: expected OWNER/NAME of the Hub, got {name!r}") from None
    except errors.LocalTokenNotFoundError:
        raise UserError("--push: not logged in; run `hf auth login` or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = "log in with a token that may write: `hf auth login`" if status in (401, 403) else "try again later"
        raise UserError(f"--push {name}: {constants.ENDPOINT} answered {status}; {remedy}") from None
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"--push {name}: {constants.ENDPOINT} cannot be reached ({reason})") from None
    return f"{constants.ENDPOINT}/{name}"
