"""A benchmark is one YAML file: images, encoders and a protocol. Finished parts of a run are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.evaluation.bootstrap import bootstrap_accuracy
from dinov3geo.evaluation.classification import ClassificationSettings, evaluate_encoder
from dinov3geo.evaluation.correspondence import THRESHOLDS, match_views, read_homography
from dinov3geo.evaluation.dense import (
    DenseSettings,
    check_heads,
    dense_samples,
    evaluate_dense,
    splits_of,
)
from dinov3geo.evaluation.dense_encoders import make_dense_encoders
from dinov3geo.evaluation.dense_sets import DenseSet, DenseSource, load_dense_set
from dinov3geo.evaluation.discovery import DiscoverySource, correct_localisation
from dinov3geo.evaluation.encoders import DEFAULT_SIZE, short_digest
from dinov3geo.evaluation.frames import patch_encoder, pixel_encoder
from dinov3geo.evaluation.image_sets import ImageSet, Indexes, read_image, split_images
from dinov3geo.evaluation.named_encoders import BASELINES, UNTRAINED, Input, make_encoders, untrained
from dinov3geo.evaluation.results import Row, read_rows, results_text, rows_of
from dinov3geo.evaluation.sources import Source, load_source, measure
from dinov3geo.features.extract import FeatureCache
from dinov3geo.heads.fit import FitSample
from dinov3geo.paths import written_whole

PIXELS, ALL_BASELINES = "pixels", "baselines"
WHOLE = "the whole picture"
Progress = Callable[[str, int, int], None]
Task = Literal["classification", "correspondence", "segmentation", "regression", "discovery"]
_KEYS: dict[Task, str] = {
    "classification": "source",
    "correspondence": "views",
    "segmentation": "dense",
    "regression": "dense",
    "discovery": "objects",
}


class ViewPairs(BaseModel):
    """Views of one plane: the first one, the others, and the homographies to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    first: str
    others: tuple[str, ...] = Field(min_length=1)
    homographies: tuple[str, ...] = Field(min_length=1, description="text files, one per other view")
    short_side: int | None = Field(None, ge=16, description="views are resized to it")


class BenchmarkConfig(BaseModel):
    """One benchmark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    task: Task = "classification"
    encoders: tuple[str, ...] = Field((DEFAULT_BACKBONE, *BASELINES), min_length=1)
    source: Source | None = Field(None, description="for classification")
    views: ViewPairs | None = Field(None, description="for correspondence")
    dense: DenseSource | None = Field(None, description="for segmentation and regression")
    objects: DiscoverySource | None = Field(None, description="for discovery")
    size: int | None = Field(DEFAULT_SIZE, ge=1)
    crop_from: int | None = Field(None, ge=1)
    stem: str | None = Field(None, description="kernels of bands that weights do not know: mean or zero")
    settings: ClassificationSettings = Field(default_factory=ClassificationSettings)
    dense_settings: DenseSettings = Field(default_factory=DenseSettings)

    def needs(self) -> Source | ViewPairs | DenseSource | DiscoverySource:
        """The data of the task.

        Raises:
            ConfigError: the key is missing, or says other than the task.
        """
        key = _KEYS[self.task]
        found: Source | ViewPairs | DenseSource | DiscoverySource | None = getattr(self, key)
        if found is None:
            raise ConfigError(f"benchmark {self.name!r}: the task {self.task} needs the key {key!r}")
        if isinstance(found, DenseSource):
            meaning = "classes" if self.task == "segmentation" else "quantity"
            if getattr(found, meaning) is None:
                raise ConfigError(f"benchmark {self.name!r}: {self.task} needs the key 'dense.{meaning}'")
        return found


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """Rows of all benchmarks, and notes on what could not be done; how many parts were there already."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    kept: int


def run_benchmark(
    config: BenchmarkConfig,
    parts: Path,
    *,
    encoders: Sequence[str] = (),
    device: torch.device | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> BenchmarkRun:
    """Runs one benchmark, encoder by encoder.

    Args:
        config: of the benchmark.
        parts: folder of finished parts: one file per encoder, taken up by the next run as long as
            configuration, weights and images are the same.
        encoders: names that take the place of the configured ones; `baselines` stands for all baselines.
        device: to compute on.
        cache: folder of vectors kept from earlier calls, or None.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: a name, file or number that cannot be used.
    """
    config.needs()
    names = [
        n for name in (encoders or config.encoders) for n in (BASELINES if name == ALL_BASELINES else (name,))
    ]
    names = list(dict.fromkeys(names))
    device = device or torch.device("cpu")
    if config.task == "correspondence":
        return _correspondence(config, names, device, progress)
    if config.task == "discovery":
        return _discovery(config, names, device, progress)
    if config.task in ("segmentation", "regression"):
        return _dense(config, parts, names, device, cache, progress)
    return _classification(config, parts, names, device, cache, progress)


def _classification(
    config: BenchmarkConfig,
    parts: Path,
    names: Sequence[str],
    device: torch.device,
    cache: Path | None,
    progress: Progress | None,
) -> BenchmarkRun:
    source, settings = config.source, config.settings
    assert source is not None
    images = load_source(source, name=config.name)
    split = split_images(images, test_share=settings.test_share, validation_share=settings.validation_share)
    seen = _input(config, source, images, split.fitted, device, settings.seed)
    rows: list[Row] = []
    notes: list[str] = []
    kept = 0
    for encoder in make_encoders(names, seen):
        encoder.prepare(images, split.fitted)
        facts = (images.stamp, encoder.digest(), encoder.name, settings.model_dump_json(), config.name)
        path = _part_file(parts, config.name, facts)
        if path.is_file():
            kept += 1
        else:
            results, left_out = evaluate_encoder(
                encoder, images, split, settings, cache=cache, progress=progress
            )
            found = [
                row
                for r in results
                for row in rows_of(config.name, encoder.name, r.method, r.scores, r.details)
            ]
            _keep(path, found, left_out)
        rows += read_rows(path)
        notes += json.loads(path.read_text(encoding="utf-8"))["notes"]
    return BenchmarkRun(tuple(rows), tuple(dict.fromkeys(notes)), kept)


def _dense(
    config: BenchmarkConfig,
    parts: Path,
    names: Sequence[str],
    device: torch.device,
    cache: Path | None,
    progress: Progress | None,
) -> BenchmarkRun:
    source, settings = config.dense, config.dense_settings
    assert source is not None
    check_heads(source, settings)
    images = load_dense_set(source, name=config.name, max_window=settings.max_window)
    splits = splits_of(images, settings)
    # Bands are measured on what no part holds out, or on everything where each place is held out once.
    seen_in_training = splits[0][0] if len(splits) == 1 else np.arange(len(images))
    seen = _input(config, source, images, seen_in_training, device, settings.seed)
    rows: list[Row] = []
    kept = 0
    for encoder in make_dense_encoders(names, seen, num_maps=settings.num_maps, lattice=settings.lattice):
        encoder.prepare(images, seen_in_training)
        samples: list[list[FitSample]] | None = None
        for kind in settings.heads:
            plain = settings.model_copy(update={"heads": (kind,)}).model_dump_json()
            facts = (images.stamp, images.groups, encoder.digest(), encoder.name, plain, config.name)
            path = _part_file(parts, config.name, facts)
            if path.is_file():
                kept += 1
            else:
                samples = samples or dense_samples(
                    encoder, images, settings, cache=FeatureCache(cache), progress=progress
                )
                found = evaluate_dense(
                    samples, images, source, settings, kind, splits, device=device, progress=progress
                )
                _keep(path, rows_of(config.name, encoder.name, kind, found.scores, found.details), [])
            rows += read_rows(path)
    return BenchmarkRun(tuple(rows), (), kept)


def _input(
    config: BenchmarkConfig,
    source: Source | DenseSource,
    images: ImageSet | DenseSet,
    fitted: Indexes,
    device: torch.device,
    seed: int,
) -> Input:
    """How encoders see a set of images; statistics of its own are those of the part that is `fitted`."""
    return Input(
        size=config.size,
        crop_from=config.crop_from,
        bands=images.bands,
        sensor=source.sensor,
        stem=config.stem,
        normalization=measure(images, fitted, images.bands) if source.statistics == "train" else None,
        device=device,
        seed=seed,
    )


def _part_file(parts: Path, name: str, facts: Sequence[object]) -> Path:
    """Where a finished part lies; other facts give another name."""
    return parts / f"{_file_name(name)}_{short_digest(repr(tuple(facts)))[:16]}.json"


def _keep(path: Path, rows: Sequence[Row], notes: Sequence[str]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(results_text(rows, {"notes": list(notes)}), encoding="utf-8")


def _correspondence(
    config: BenchmarkConfig, names: Sequence[str], device: torch.device, progress: Progress | None
) -> BenchmarkRun:
    views = config.views
    assert views is not None
    if len(views.others) != len(views.homographies):
        raise ConfigError(
            f"benchmark {config.name!r}: {len(views.others)} other views and {len(views.homographies)} "
            "homographies; one is needed for each"
        )
    first = read_image(views.root / views.first)
    pairs = [
        (read_image(views.root / other), read_homography(views.root / file))
        for other, file in zip(views.others, views.homographies, strict=True)
    ]
    rows = []
    for number, name in enumerate(dict.fromkeys([*names, PIXELS])):
        if name in BASELINES and name != UNTRAINED:
            continue  # they have one vector an image, none a patch
        shown, encode = _patches(name, views.short_side, device, config.settings.seed)
        errors = []
        for other, homography in pairs:
            errors.append(match_views(first, other, homography, encode).errors)
        if progress is not None:
            progress(shown, number + 1, len(names) + 1)
        columns = [
            *((f"{config.name} {Path(o).stem}", e) for o, e in zip(views.others, errors, strict=True)),
            (config.name, np.concatenate(errors)),
        ]
        for data, found in columns:
            for limit in THRESHOLDS:
                share = bootstrap_accuracy(
                    found <= limit, resamples=config.settings.resamples, seed=config.settings.seed
                )
                details = {"patches": len(found)}
                rows += rows_of(data, shown, f"within {limit:g}", {"share_of_patches": share}, details)
    return BenchmarkRun(tuple(rows), (), 0)


def _discovery(
    config: BenchmarkConfig, names: Sequence[str], device: torch.device, progress: Progress | None
) -> BenchmarkRun:
    source, settings = config.objects, config.settings
    assert source is not None
    rows: list[Row] = []
    for name in dict.fromkeys([*names, PIXELS, WHOLE]):
        if name in BASELINES and name != UNTRAINED:
            continue  # they have one vector an image, none a patch
        shown, encode = (
            (WHOLE, None) if name == WHOLE else _patches(name, source.short_side, device, settings.seed)
        )
        tell = None if progress is None else partial(progress, shown)
        hits = correct_localisation(source, encode, progress=tell)
        share = bootstrap_accuracy(hits, resamples=settings.resamples, seed=settings.seed)
        rows += rows_of(config.name, shown, "normalised cut", {"corloc": share}, {"images": len(hits)})
    return BenchmarkRun(tuple(rows), (), 0)


def _patches(name: str, short_side: int | None, device: torch.device, seed: int) -> tuple[str, Any]:
    if name == PIXELS:
        return "raw pixels of the patches", pixel_encoder(short_side=short_side)
    if name.partition(":")[0] == UNTRAINED:
        backbone = untrained(name.partition(":")[2], Input(seed=seed))
    else:
        backbone = load_backbone(name)
    if backbone.in_channels != 3:
        raise DataError(f"{name} takes {backbone.in_channels} bands, but the views are red, green, blue")
    shown = name if backbone.card is None else backbone.card.name
    return shown, patch_encoder(backbone.to(device), short_side=short_side)


def distinct_names(rows: Sequence[Row]) -> list[Row]:
    """The rows, each data set, encoder, method and metric once, the last of equals."""
    return list({(r.data, r.encoder, r.method, r.metric): r for r in rows}.values())


def replace_between_marks(text: str, name: str, table: str) -> str:
    """A text with a table between `<!-- benchmark NAME -->` and `<!-- /benchmark -->`.

    Raises:
        ConfigError: the text has no such marks.
    """
    pattern = re.compile(
        rf"(<!-- benchmark {re.escape(name)} -->\n).*?(<!-- /benchmark -->)", flags=re.DOTALL
    )
    if not pattern.search(text):
        raise ConfigError(f"no marks <!-- benchmark {name} --> and <!-- /benchmark --> to write between")
    return pattern.sub(lambda found: f"{found[1]}{table}{found[2]}", text)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
