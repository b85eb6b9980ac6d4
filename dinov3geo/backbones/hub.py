"""Weights of the Hugging Face hub: from its cache on this machine, over the network only when asked."""

from __future__ import annotations

from pathlib import Path

from dinov3geo.errors import ConfigError, DataError, UnknownNameError

PREFIX = "hub:"
# No pickles: whoever uploads one can put code into it, and safetensors hold the same.
_PATTERNS = ["*.json", "*.safetensors"]


def is_hub_name(name: str | Path) -> bool:
    """Whether a name means a repository of the hub, e.g. `hub:facebook/dinov3-vits16-pretrain-lvd1689m`."""
    return str(name).startswith(PREFIX)


def locate_repository(name: str, *, download: bool = False) -> Path:
    """Folder with the files of a repository.

    Args:
        name: `hub:owner/repository`, or `hub:owner/repository@revision`.
        download: fetch what is missing, with the token that `hf auth login` stored; otherwise nothing
            leaves this machine.

    Returns:
        A snapshot in the cache of `huggingface_hub`; its name is the commit.

    Raises:
        ConfigError: the name has another form.
        UnknownNameError: no such repository or revision on the hub.
        DataError: it is not in the cache, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if len([part for part in repository.split("/") if part]) != 2:
        raise ConfigError(
            f"expected {PREFIX}owner/repository or {PREFIX}owner/repository@revision, got {name}"
        )
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=_PATTERNS,
            local_files_only=not download,
        )
    except HFValidationError as error:
        raise ConfigError(f"{name} is no name of a repository ({error})") from error
    except LocalEntryNotFoundError as error:
        if download:
            raise DataError(f"{name} cannot be fetched: the hub is not reached ({_first(error)})") from error
        raise DataError(
            f"{name} is not in the cache of this machine, and nothing is fetched unasked; "
            f"fetch it with: dinov3geo models {name} --download"
        ) from error
    except GatedRepoError as error:
        raise DataError(
            f"{name} is gated: accept its terms on its page of the hub, then log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UnknownNameError("repository or revision of the hub", name, []) from error
    except OSError as error:
        raise DataError(f"{name} cannot be fetched ({_first(error)})") from error
    return Path(folder)


def _first(error: Exception) -> str:
    """First line of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
