"""May a file be written there? Answered before any work, without leaving a trace."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3geo.errors import RasterError


def folder_obstacle(folder: Path) -> str | None:
    """What keeps files from being written into a folder that may not exist yet; None if nothing does."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        return f"{existing} is a file, expected a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return os.strerror(error.errno or 0)


def user_cache_folder() -> Path:
    """`dinov3geo` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dinov3geo"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuses to take the place of a folder, or of a file unless that is wanted.

    Raises:
        RasterError: the place is taken.
    """
    if path.is_dir():
        raise RasterError(f"cannot write {path}: it is a folder, expected a file name")
    if path.exists() and not overwrite:
        raise RasterError(f"cannot write {path}: it exists already; choose another name or overwrite it")


def check_target(path: Path, *, sources: Iterable[Path], overwrite: bool) -> None:
    """Checks that a file can be written without harm to what it is made from.

    Args:
        path: file to write.
        sources: files that are read, which nothing may replace.
        overwrite: whether an existing file may be replaced.

    Raises:
        RasterError: the path is one of the sources, taken, or in a folder that cannot be written.
    """
    for source in sources:
        if path.resolve() == source.resolve() or (
            path.exists() and source.exists() and path.samefile(source)
        ):
            raise RasterError(
                f"cannot write {path}: it would replace its own source {source}; choose another name"
            )
    check_free(path, overwrite=overwrite)
    obstacle = folder_obstacle(path.parent)
    if obstacle is not None:
        raise RasterError(f"cannot write {path}: {obstacle}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder, which is made, and renames the file when the block is done.

    Raises:
        RasterError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RasterError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
