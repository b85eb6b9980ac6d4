"""The hidden folder in which a raster grows, strip by strip, until it is whole.

A strip counts once its line stands in the journal. Whatever a killed process left beside (a file without a
line, half a line) is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from dinov3geo.errors import RasterError

_JOURNAL, _JOB, _LOCK = "journal.jsonl", "job.txt", "lock"


@dataclass(slots=True)
class Statistics:
    """Of the numbers with data, per band.

    Attributes:
        bands: how many.
        pixels: pixels with and without data.
        count: [bands] numbers with data.
        total: [bands] their sum.
        squares: [bands] the sum of their squares.
        minimum: [bands], infinity where there is none.
        maximum: [bands], minus infinity where there is none.
    """

    bands: int
    pixels: int = 0
    count: list[int] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    minimum: list[float] = field(default_factory=list)
    maximum: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Fills what was not given with the statistics of nothing."""
        for name, empty in (("count", 0), ("total", 0.0), ("squares", 0.0)):
            if not getattr(self, name):
                setattr(self, name, [empty] * self.bands)
        self.minimum = self.minimum or [float("inf")] * self.bands
        self.maximum = self.maximum or [float("-inf")] * self.bands

    @classmethod
    def of(cls, rows: NDArray[Any], nodata: float | None) -> Self:
        """Of rows [C, n, w]."""
        found = cls(len(rows), pixels=rows.shape[1] * rows.shape[2])
        for band, numbers in enumerate(rows):
            if nodata is None:
                known = numbers.ravel()
            elif np.isnan(nodata):
                known = numbers[~np.isnan(numbers)]
            else:
                known = numbers[numbers != numbers.dtype.type(nodata)]
            if known.size:
                found.count[band] = known.size
                found.total[band] = float(known.sum(dtype=np.float64))
                # In one pass, without an array of squares.
                found.squares[band] = float(np.einsum("i,i->", known, known, dtype=np.float64))
                found.minimum[band], found.maximum[band] = float(known.min()), float(known.max())
        return found

    def add(self, other: Statistics) -> None:
        """Adds those of other rows."""
        self.pixels += other.pixels
        for band in range(self.bands):
            self.count[band] += other.count[band]
            self.total[band] += other.total[band]
            self.squares[band] += other.squares[band]
            self.minimum[band] = min(self.minimum[band], other.minimum[band])
            self.maximum[band] = max(self.maximum[band], other.maximum[band])

    def gdal_tags(self, band: int) -> dict[str, str]:
        """GDAL's statistics of one band (from 0 on), none for a band without data."""
        count = self.count[band]
        if not count:
            return {}
        mean = self.total[band] / count
        deviation = max(self.squares[band] / count - mean**2, 0.0) ** 0.5
        return {
            "STATISTICS_MINIMUM": f"{self.minimum[band]:.9g}",
            "STATISTICS_MAXIMUM": f"{self.maximum[band]:.9g}",
            "STATISTICS_MEAN": f"{mean:.9g}",
            "STATISTICS_STDDEV": f"{deviation:.9g}",
            "STATISTICS_VALID_PERCENT": f"{100 * count / self.pixels:.4g}",
        }


@dataclass(frozen=True, slots=True)
class FinishedStrip:
    """A strip that lies on disk.

    Attributes:
        path: TIFF file of one row of blocks.
        statistics: of its numbers.
    """

    path: Path
    statistics: Statistics


class WorkFolder:
    """The work folder of one output, `.NAME.unfinished` if its job can be taken up again."""

    def __init__(self, output: Path, job: str) -> None:
        """Names the folder; nothing is made yet.

        Args:
            output: file to come.
            job: everything that the rows depend on, "" for work that cannot be taken up again.
        """
        self.output = output
        self.job = hashlib.sha256(job.encode()).hexdigest() if job else ""
        self.path = output.with_name(f".{output.name}.unfinished")
        self._made_folders: list[Path] = []
        self._lock: IO[str] | None = None
        self._own = False

    @property
    def advice(self) -> str:
        """What a user does about a full disk."""
        if not self.job:
            return "free some room and try again"
        return "free some room and run the same command again: it goes on with the rows finished so far"

    def open(self, *, overwrite: bool) -> list[FinishedStrip]:
        """Makes the folder, or enters that of an unfinished run of the same job.

        Args:
            overwrite: whether unfinished work of another job may be thrown away.

        Returns:
            The strips that are finished, top to bottom.

        Raises:
            OSError: it cannot be made.
            RasterError: it belongs to a process that still runs, or to another job.
        """
        self._make_folders()
        if not self.job:
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.", dir=self.output.parent))
            self._own = True
            return []
        self.path.mkdir(exist_ok=True)
        self._take_lock()
        self._own = True
        job_file = self.path / _JOB
        known = job_file.read_text() if job_file.exists() else ""
        if known and known != self.job:
            if not overwrite:
                self._own = False
                raise RasterError(
                    f"cannot write {self.output}: {self.path} holds unfinished work of another command; "
                    "finish that one (run it again), or throw it away by --overwrite"
                )
            self._clear()
        elif not known:
            self._clear()
        job_file.write_text(self.job)
        strips = list(self._finished())
        self._cut_journal(len(strips))
        return strips

    def add_strip(self, number: int, content: bytes, statistics: Statistics) -> Path:
        """Writes a strip and, once it is on disk, its line in the journal.

        Raises:
            OSError: the disk refuses.
        """
        path = self.path / f"strip{number:06d}.tif"
        _write_whole(path, content)
        if self.job:
            with (self.path / _JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(
                    json.dumps({"strip": number, "bytes": len(content), **asdict(statistics)}) + "\n"
                )
                journal.flush()
                os.fsync(journal.fileno())
        return path

    def overview_path(self, level: int, number: int) -> Path:
        """Where a strip of an overview goes."""
        return self.path / f"overview{level:02d}_{number:06d}.tif"

    def remove(self) -> None:
        """Removes the folder: the output is whole."""
        self._release()
        shutil.rmtree(self.path)

    def leave(self, *, keep: bool) -> None:
        """Leaves the work.

        Args:
            keep: whether finished strips of a job that can be taken up again stay.
        """
        if not self._own:
            self._release()
        elif keep and self.job and (self.path / _JOURNAL).exists():
            self._release()
            return
        else:
            self._release()
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self._made_folders):
            try:
                folder.rmdir()
            except OSError:
                break  # somebody else has put something there

    def _make_folders(self) -> None:
        """Makes the output's missing folders and remembers them, to take them away after an error."""
        missing = [p for p in (self.output.parent, *self.output.parent.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._made_folders.append(folder)

    def _take_lock(self) -> None:
        """Keeps other processes out for as long as this one lives.

        Raises:
            RasterError: one is at work here.
        """
        self._lock = (self.path / _LOCK).open("w")
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(self._lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release()
            raise RasterError(f"cannot write {self.output}: another process is writing it") from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _clear(self) -> None:
        for file in self.path.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name != _LOCK:
                file.unlink()

    def _finished(self) -> Iterator[FinishedStrip]:
        """The strips of the journal whose files are whole, up to the first one that is not."""
        journal = self.path / _JOURNAL
        if not journal.exists():
            return
        for number, line in enumerate(journal.read_text(encoding="utf-8").splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:
                return  # the process was killed while it wrote this line
            path = self.path / f"strip{number:06d}.tif"
            if entry.pop("strip") != number or not path.exists() or path.stat().st_size != entry.pop("bytes"):
                return
            yield FinishedStrip(path, Statistics(**entry))

    def _cut_journal(self, lines: int) -> None:
        """Drops all lines after the good ones."""
        journal = self.path / _JOURNAL
        if journal.exists():
            good = journal.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
            _write_whole(journal, "".join(good).encode())


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name, brings it to the disk and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
