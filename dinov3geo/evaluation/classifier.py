"""A fitted classifier of whole images: saved with its backbone's name or weights, and used on files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import geopandas
import torch
from pyproj import CRS
from shapely.geometry import Polygon, box
from torch import Tensor, nn

from dinov3geo.backbones.base import Backbone
from dinov3geo.errors import ConfigError, DataError, GeoreferenceError
from dinov3geo.evaluation.attention_probe import (
    AttentionPooling,
    attention_scores,
    choose_attention,
    fit_attention,
    num_heads,
)
from dinov3geo.evaluation.classification import ClassificationSettings, main_score
from dinov3geo.evaluation.encoders import CLS, BackboneEncoder, encode, encode_patches
from dinov3geo.evaluation.image_sets import ImageSet, files_set, split_images
from dinov3geo.evaluation.knn import weighted_votes
from dinov3geo.evaluation.logistic import fit_logistic, sweep_logistic
from dinov3geo.heads.base import OutputSpec
from dinov3geo.heads.folders import (
    CARD_FILE,
    check_free,
    find_model,
    load_head_weights,
    load_model_backbone,
    model_card,
    read_card,
    save_model,
)
from dinov3geo.paths import written_whole
from dinov3geo.rasters.reader import RASTER_SUFFIXES, inspect_scene

PRODUCT = "scene_class"
DEFAULT_MODEL = "eurosat-tiny-satellite"
BUNDLED_MODELS = (DEFAULT_MODEL,)
TABLE_SUFFIXES = (".csv", ".gpkg")
_WGS84 = CRS.from_epsg(4326)

Kind = Literal["logistic", "knn", "attention"]


class LinearClasses(nn.Module):
    """Probabilities by logistic regression."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Takes [K, D] and [K]."""
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, vectors: Tensor) -> Tensor:
        """[N, K] of [N, D]; rows sum to 1."""
        weight, bias = cast(Tensor, self.weight), cast(Tensor, self.bias)
        return (vectors @ weight.T + bias).softmax(1)


class AttentionClasses(nn.Module):
    """Probabilities by attention pooling of patches."""

    def __init__(self, probe: AttentionPooling) -> None:
        """Takes a probe."""
        super().__init__()
        self.probe = probe

    def forward(self, patches: Tensor) -> Tensor:
        """[N, K] of [N, P, D]; rows sum to 1."""
        return attention_scores(self.probe, patches).softmax(1)


class NeighbourClasses(nn.Module):
    """Shares of the weighted vote of the nearest training images."""

    def __init__(self, bank: Tensor, labels: Tensor, *, num_classes: int, k: int, temperature: float) -> None:
        """Takes vectors [N, D] and class numbers [N]."""
        super().__init__()
        self.register_buffer("bank", bank.float())
        self.register_buffer("labels", labels)
        self.num_classes, self.k, self.temperature = num_classes, k, temperature

    def forward(self, vectors: Tensor) -> Tensor:
        """[M, K] of [M, D]; rows sum to 1."""
        bank, labels = cast(Tensor, self.bank), cast(Tensor, self.labels)
        return weighted_votes(
            bank,
            labels,
            vectors,
            num_classes=self.num_classes,
            ks=(self.k,),
            temperature=self.temperature,
        )[self.k]


@dataclass(frozen=True)
class SceneClassifier:
    """A classifier with its backbone.

    Attributes:
        encoder: images to vectors.
        head: vectors to probabilities.
        classes: K names.
        bands: to read from rasters.
        score: on the validation images.
        card: what is known of the model.
    """

    encoder: BackboneEncoder
    head: nn.Module
    classes: tuple[str, ...]
    bands: tuple[str, ...] | None
    score: float
    card: dict[str, Any]

    @property
    def backbone(self) -> Backbone:
        """What the encoder runs."""
        return self.encoder.backbone


def fit_classifier(
    images: ImageSet,
    backbone: Backbone,
    source: str | Path,
    folder: Path,
    *,
    kind: Kind = "logistic",
    size: int,
    bands: Sequence[str] | None = None,
    settings: ClassificationSettings | None = None,
    k: int = 20,
    cache: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> SceneClassifier:
    """Fits a classifier to all images and saves it; C is chosen on a part of them first.

    Args:
        images: with one class each.
        backbone: frozen, with a card.
        source: name or path that it was loaded from.
        folder: of the model.
        kind: logistic regression, nearest neighbours, or attention pooling of patches.
        size: side that images are resized to.
        bands: that were read from rasters.
        settings: grid of C, temperature and shares.
        k: neighbours.
        cache: folder of vectors kept from earlier calls, or None.
        overwrite: replace an existing model.
        command: that was typed, for the card.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        UserError: images, backbone or folder that cannot be used.
    """
    if images.multi_label:
        raise DataError(f"{images.name} has several classes per image; a classifier gives one")
    settings = settings or ClassificationSettings()
    check_free(folder, what="classification", overwrite=overwrite)
    split = split_images(images, test_share=settings.test_share, validation_share=settings.validation_share)
    encoder = BackboneEncoder(backbone, size=size)
    encoder.prepare(images, split.fitted)
    tell = None if progress is None else lambda done, total: progress("images", done, total)
    vectors = _inputs(encoder, images, kind, cache=cache, progress=tell)
    head, score, chosen = _fit_head(vectors, images, split.train, split.test, kind, k, settings)
    spec = OutputSpec(name=PRODUCT, unit="", class_names=images.classes, dtype="uint8", nodata=255)
    card = model_card(backbone, source, spec) | {
        "kind": kind,
        "size": size,
        "bands": None if bands is None else list(bands),
        "chosen": chosen,
        "images": len(images),
        "validation_accuracy": score,
        "command": command,
    }
    save_model(folder, backbone, head, card, what="classification", overwrite=overwrite)
    return SceneClassifier(
        encoder, head, images.classes, None if bands is None else tuple(bands), score, card
    )


def _fit_head(
    vectors: Tensor,
    images: ImageSet,
    train: Any,  # noqa: ANN401 (an array of numbers)
    held: Any,  # noqa: ANN401
    kind: Kind,
    k: int,
    settings: ClassificationSettings,
) -> tuple[nn.Module, float, dict[str, float]]:
    """A head on all vectors, its accuracy on those held out, and what was chosen."""
    classes, labels = len(images.classes), images.labels
    validation = vectors[held], labels[held]
    if kind == "knn":

        def neighbours(bank: Tensor, own: Tensor) -> NeighbourClasses:
            return NeighbourClasses(bank, own, num_classes=classes, k=k, temperature=settings.temperature)

        score = main_score(neighbours(vectors[train], labels[train])(validation[0]), validation[1])
        return neighbours(vectors, labels), score, {"k": k, "temperature": settings.temperature}
    if kind == "attention":
        best = choose_attention(
            (vectors[train], labels[train]),
            validation,
            num_classes=classes,
            score=main_score,
            rates=settings.attention_rates,
            epochs=settings.attention_epochs,
            seed=settings.seed,
        )
        probe = fit_attention(
            vectors,
            labels,
            num_classes=classes,
            rate=best.rate,
            epochs=settings.attention_epochs,
            seed=settings.seed,
        )
        return AttentionClasses(probe), best.score, {"learning_rate": best.rate}
    c, scores = sweep_logistic(
        vectors[train], labels[train], validation, num_classes=classes, score=main_score, cs=settings.cs
    )
    model = fit_logistic(vectors, labels, num_classes=classes, c=c)
    return LinearClasses(model.weight, model.bias), max(scores), {"c": c}


def load_classifier(name_or_folder: str | Path = DEFAULT_MODEL) -> SceneClassifier:
    """A bundled classifier, or one that `fit_classifier` saved.

    Raises:
        UnknownNameError: neither a bundled name nor a folder.
        ConfigError: not such a model, or of other weights than the backbone's.
        DataError: its weights are damaged.
    """
    folder = find_model(name_or_folder, BUNDLED_MODELS, what="classification", command="classify fit")
    card = read_card(folder / CARD_FILE, product=PRODUCT)
    try:
        backbone = load_model_backbone(folder, card)
        classes = tuple(card["output"]["class_names"])
        head: nn.Module
        width = backbone.embed_dim
        if card["kind"] == "knn":
            chosen, count = card["chosen"], int(card["images"])
            head = NeighbourClasses(
                torch.zeros(count, width),
                torch.zeros(count, dtype=torch.long),
                num_classes=len(classes),
                k=int(chosen["k"]),
                temperature=float(chosen["temperature"]),
            )
        elif card["kind"] == "attention":
            head = AttentionClasses(AttentionPooling(width, len(classes), num_heads=num_heads(width)))
        else:
            head = LinearClasses(torch.zeros(len(classes), width), torch.zeros(len(classes)))
        load_head_weights(folder, head)
        bands = None if card["bands"] is None else tuple(card["bands"])
        encoder = BackboneEncoder(backbone, size=int(card["size"]))
        return SceneClassifier(encoder, head, classes, bands, float(card["validation_accuracy"]), card)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError | DataError):
            raise
        raise ConfigError(f"{folder / CARD_FILE} is incomplete: {error!r}") from error


def classify_files(
    model: SceneClassifier,
    files: Sequence[Path],
    output: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> geopandas.GeoDataFrame:
    """Classifies images and writes a table: CSV, or a GeoPackage of footprints.

    Args:
        model: from `load_classifier`.
        files: images; a GeoPackage wants all of them georeferenced.
        output: .csv or .gpkg, replaced if it exists.
        progress: called with how many images are done.

    Returns:
        One row per image: file, class, probability, and the footprint where there is one.

    Raises:
        UserError: a file that cannot be used or written.
    """
    if output.suffix.lower() not in TABLE_SUFFIXES:
        raise ConfigError(f"{output}: unknown form of table; valid suffixes: {', '.join(TABLE_SUFFIXES)}")
    wants_place = output.suffix.lower() == ".gpkg"
    places = [_footprint(file, wanted=wants_place) for file in files]
    blank = torch.zeros(len(files), dtype=torch.long)
    images = files_set("images", files, blank, model.classes, bands=model.bands)
    kind: Kind = "attention" if isinstance(model.head, AttentionClasses) else "logistic"
    vectors = _inputs(model.encoder, images, kind, progress=progress)
    with torch.no_grad():
        probabilities = model.head(vectors)
    best = probabilities.argmax(1)
    systems = {crs for _, crs in places if crs is not None}
    # Footprints of several systems meet in geographic coordinates.
    target = next(iter(systems)) if len(systems) == 1 else _WGS84
    geometry = [
        None if shape is None else geopandas.GeoSeries([shape], crs=crs).to_crs(target).iloc[0]
        for shape, crs in places
    ]
    table = geopandas.GeoDataFrame(
        {
            "file": [str(file) for file in files],
            "class": [model.classes[k] for k in best.tolist()],
            "probability": [round(p, 4) for p in probabilities.amax(1).tolist()],
        },
        geometry=geometry,
        crs=target,
    )
    with written_whole(output) as temporary:
        if wants_place:
            table.to_file(temporary, driver="GPKG", layer="classes")
        else:
            table.drop(columns="geometry").to_csv(temporary, index=False)
    return table


def _inputs(
    encoder: BackboneEncoder,
    images: ImageSet,
    kind: Kind,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What a head of a kind looks at: patches [N, P, D], or class tokens [N, D]."""
    if kind == "attention":
        return encode_patches(encoder, images, cache=cache, progress=progress)
    return encode(encoder, images, cache=cache, progress=progress)[:, encoder.columns()[CLS]]


def _footprint(file: Path, *, wanted: bool) -> tuple[Polygon | None, CRS | None]:
    if file.suffix.lower() not in RASTER_SUFFIXES:
        if wanted:
            raise GeoreferenceError(f"{file} has no place on the ground; write a .csv instead of a .gpkg")
        return None, None
    try:
        grid = inspect_scene(file).grid
    except GeoreferenceError:
        if wanted:
            raise
        return None, None
    x0, y0 = grid.transform @ (0, 0)
    x1, y1 = grid.transform @ (grid.width, grid.height)
    return box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), CRS.from_user_input(grid.crs)
