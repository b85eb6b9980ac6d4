"""Files of weights: safetensors, Hugging Face folders and PyTorch files without code."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov3geo.errors import DataError

PICKLES = (".pth", ".pt", ".bin")
HF_CONFIG, HF_PROCESSOR = "config.json", "preprocessor_config.json"
HF_WEIGHTS, HF_INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file under a temporary name, flushes it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        usual = stat.S_IMODE(temporary.stat().st_mode)
        save_file(tensors, temporary, metadata=metadata)
        # safetensors leaves files that nobody but their owner may read; some mounts know no modes.
        with suppress(PermissionError):
            temporary.chmod(usual)
        _finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a PyTorch file of tensors only, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(tensors, temporary)
        _finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _finish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        DataError: the file is damaged or of another type.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file ({error}); was it cut short?") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or a Hugging Face folder, whatever its format.

    Args:
        path: a .safetensors file, a PyTorch file, or a folder of one or several .safetensors files.

    Raises:
        DataError: damaged, of another type, or a pickle that holds more than tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLES:
        return read_checkpoint(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)
    raise DataError(f"{path} is no file of weights; expected .safetensors, {', '.join(PICKLES)} or a folder")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file: bare, or those of the key `teacher`.

    Nothing in the file is executed: a pickle that asks for code is refused.

    Raises:
        DataError: refused, damaged, or without tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of old pickle protocols, which are read or refused
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it holds more than tensors, or is no PyTorch file"
        raise DataError(
            f"{path} is refused, nothing in it was run: {what}; expected a file of tensors only"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise DataError(f"{path} is not a readable PyTorch file ({reason}); was it cut short?") from error
    held = loaded.get("teacher", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(held, Mapping) or not held:
        raise DataError(f"{path} holds {type(held).__name__}, expected a dictionary of tensors")
    others = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    if others:
        raise DataError(
            f"{path} holds {', '.join(others[:4])}, which are no tensors; expected a backbone, or a training "
            "checkpoint with the key 'teacher'"
        )
    return {str(name): tensor for name, tensor in held.items()}


def _is_zip(path: Path) -> bool:
    """Only the zip format of torch.save can be mapped into memory."""
    try:
        with path.open("rb") as opened:
            return opened.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / HF_INDEX
    if not index.is_file():
        return read_tensors(folder / HF_WEIGHTS)
    places = read_json(index).get("weight_map")
    if not (isinstance(places, dict) and all(isinstance(part, str) for part in places.values())):
        raise DataError(f"{index} has no 'weight_map' from tensors to files")
    parts = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= read_tensors(folder / Path(part).name)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: not readable, or no object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds {type(fields).__name__}, expected an object")
    return fields
