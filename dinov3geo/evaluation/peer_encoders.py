"""Models of timm and transformers as encoders, where these packages and the weights are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3geo.backbones.card import NORMALIZATIONS, Normalization
from dinov3geo.backbones.store import read_json, read_weights
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.evaluation.encoders import VECTOR, check_bands, short_digest
from dinov3geo.evaluation.image_sets import ImageSet, Indexes
from dinov3geo.features.extract import weights_digest

TIMM, TRANSFORMERS = "timm:", "transformers:"


class PeerEncoder:
    """A model that gives one vector an image, for red, green and blue."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        name: str,
        normalization: Normalization,
        size: int | None,
        crop_from: int | None,
        device: torch.device,
    ) -> None:
        """Wraps a model; arguments as in `BackboneEncoder`."""
        self.name = name
        self.size, self.crop_from = size, crop_from
        self._model = model.to(device).eval()
        self._normalization = normalization
        self._device = device

    def prepare(self, images: ImageSet, train: Indexes) -> None:
        """Checks the bands."""
        check_bands(self.name, self._normalization.bands, images)

    def columns(self) -> Mapping[str, slice]:
        """The whole vector."""
        return {VECTOR: slice(None)}

    def digest(self) -> str:
        """Of weights, normalisation and size."""
        parts = weights_digest(self._model), self._normalization, self.size, self.crop_from
        return short_digest(repr(parts))

    @torch.no_grad()
    def __call__(self, numbers: Tensor) -> Tensor:
        """See `Encoder`."""
        found: Any = self._model(self._normalization(numbers.to(self._device)))
        if not isinstance(found, Tensor):
            pooled = getattr(found, "pooler_output", None)
            found = found.last_hidden_state[:, 0] if pooled is None else pooled
        vectors: Tensor = found.flatten(1).float().cpu()
        return vectors


def timm_encoder(name: str, *, size: int | None, crop_from: int | None, device: torch.device) -> PeerEncoder:
    """A timm model with weights from a file: `timm:vit_small_patch16_dinov3@weights.safetensors`.

    Raises:
        ConfigError: timm is not installed, no such model, or no file named.
        DataError: the weights do not fit.
    """
    model_name, _, file = name.removeprefix(TIMM).partition("@")
    if not file:
        raise ConfigError(f"{name!r} names no weights; expected {TIMM}MODEL@FILE")
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"{name!r} needs timm: pip install timm") from error
    if not Path(file).exists():
        raise ConfigError(f"{name!r}: no such file: {file}")
    if not timm.is_model(model_name):
        raise ConfigError(f"timm has no model {model_name!r}")
    try:
        model = timm.create_model(model_name, num_classes=0, dynamic_img_size=True)
    except TypeError:
        # Only transformers know this word; a convolution takes images of any size.
        model = timm.create_model(model_name, num_classes=0)
    kept = set(model.state_dict())
    tensors = {key: value for key, value in read_weights(Path(file)).items() if key in kept}
    missing = sorted(kept - set(tensors))
    if missing:
        raise DataError(
            f"{file} does not fill timm's {model_name}: {len(missing)} missing, e.g. {missing[0]}"
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(
            f"{file} does not fit timm's {model_name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    config: Any = model.pretrained_cfg
    normalization = Normalization.of_rgb8(tuple(config["mean"]), tuple(config["std"]))
    return PeerEncoder(
        model,
        name=f"timm {model_name}",
        normalization=normalization,
        size=size,
        crop_from=crop_from,
        device=device,
    )


def transformers_encoder(
    name: str, *, size: int | None, crop_from: int | None, device: torch.device
) -> PeerEncoder:
    """A model of transformers from a folder of its own form: `transformers:FOLDER`.

    Raises:
        ConfigError: transformers is not installed, or no such folder.
        DataError: the folder holds no model that gives image features.
    """
    folder = Path(name.removeprefix(TRANSFORMERS))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name!r}: no config.json in {folder}; expected a folder of transformers")
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ConfigError(f"{name!r} needs transformers: pip install transformers") from error
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{folder} is no model that transformers can load: {str(error).splitlines()[0]}"
        ) from error
    statistics = folder / "preprocessor_config.json"
    fields = read_json(statistics) if statistics.is_file() else {}
    normalization = NORMALIZATIONS["web"]
    if "image_mean" in fields and "image_std" in fields:
        normalization = Normalization.of_rgb8(tuple(fields["image_mean"]), tuple(fields["image_std"]))
    return PeerEncoder(
        model,
        name=f"transformers {folder.name}",
        normalization=normalization,
        size=size,
        crop_from=crop_from,
        device=device,
    )
