"""The one training loop: step, log, save, resume."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dinov3geo.backbones.card import BackboneCard, Normalization
from dinov3geo.backbones.device import resolve_device
from dinov3geo.backbones.variants import build_vit
from dinov3geo.backbones.vit import VisionTransformer
from dinov3geo.backbones.zoo import RUN_EXPORT, load_backbone, save_backbone
from dinov3geo.data.crops import CropMaker
from dinov3geo.data.mixture import check_bands, chip_loader, network_bands, open_sources
from dinov3geo.data.scenes import SceneDataset
from dinov3geo.errors import ConfigError, DataError
from dinov3geo.rasters.sensors import get_sensor
from dinov3geo.training import checkpoint as checkpoints
from dinov3geo.training.optimizer import build_optimizer, clip_per_module, set_rates
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.ssl import SelfSupervisedRecipe

METRICS_FILE = "metrics.jsonl"
# Keys that may change between the sittings of one run. Device and threads change its bits, not its recipe.
_FREE_ON_RESUME = ("log_every", "checkpoints", "export", "data.workers", "data.root", "device", "threads")
# Streams of randomness must not meet: crops, and the networks' own draws (dropped paths, RoPE scale).
_SEED_CROPS, _SEED_NETWORK = 1, 2

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes:
        steps: made in all, over every sitting.
        stopped_by: signal that asked it to stop early, `--resume` goes on; None if it made every step.
        weights: exported teacher backbone.
        metrics: of the last logged step.
    """

    steps: int
    stopped_by: int | None
    weights: Path
    metrics: dict[str, float]


def step_seed(seed: int, step: int, stream: int, rank: int = 0) -> int:
    """Seed of one step: the same whether the run was interrupted before it or not."""
    mixed = torch.tensor([seed, step, stream, rank], dtype=torch.int64)
    factors = torch.tensor([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], dtype=torch.int64)
    value = int((mixed + 1) @ factors)
    return (value ^ (value >> 29)) & 0x7FFFFFFF


def run_normalization(settings: TrainSettings) -> Normalization:
    """Bands and statistics of the network's input, from the sensor table."""
    bands = get_sensor(settings.data.sensor).select(settings.data.bands)
    return Normalization(
        bands=network_bands(settings.data),
        scale=tuple(band.scale for band in bands),
        offset=tuple(band.offset for band in bands),
        mean=tuple(band.mean for band in bands),
        std=tuple(band.std for band in bands),
    )


def build_crop_maker(settings: TrainSettings) -> CropMaker:
    """What turns the run's chips into crops.

    Raises:
        ConfigError: a crop size does not fit the patch size.
    """
    try:
        return CropMaker(
            settings.crops,
            settings.masks,
            run_normalization(settings),
            patch_size=settings.model.patch_size,
            nadir=get_sensor(settings.data.sensor).nadir,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_recipe(settings: TrainSettings) -> SelfSupervisedRecipe:
    """Student, teacher and anchor with the run's initial weights.

    Raises:
        ConfigError: the anchor does not fit the run.
        UnknownNameError: no such variant or weights.
    """
    torch.manual_seed(settings.seed)
    backbone = build_vit(
        settings.model.variant,
        in_channels=len(network_bands(settings.data)),
        patch_size=settings.model.patch_size,
        drop_path=settings.model.drop_path,
        layer_scale=settings.model.layer_scale,
    )
    anchor = load_anchor(settings, backbone)
    return SelfSupervisedRecipe(backbone, settings.losses, settings.gram, anchor=anchor)


def load_anchor(settings: TrainSettings, backbone: VisionTransformer) -> VisionTransformer | None:
    """The frozen backbone of Gram anchoring, or None if the run has none.

    Raises:
        UserError: it cannot be loaded, or does not fit the run.
    """
    if settings.gram.anchor is None:
        if settings.crops.gram_size is not None:
            raise ConfigError(
                "crops.gram_size is set but gram.anchor is not; name the anchor's weights or run folder"
            )
        return None
    anchor = load_backbone(settings.gram.anchor)
    if not isinstance(anchor, VisionTransformer):
        raise ConfigError(
            f"gram.anchor {settings.gram.anchor} is no vision transformer; its patches have another grid"
        )
    assert anchor.card is not None
    if anchor.card.normalization != run_normalization(settings):
        raise ConfigError(
            f"gram.anchor {settings.gram.anchor} was trained on other bands or statistics "
            f"({', '.join(anchor.card.normalization.bands)}) than data.sensor {settings.data.sensor!r} gives"
        )
    if settings.gram.refresh_every is not None and anchor.card.variant != settings.model.variant:
        raise ConfigError(
            f"gram.refresh_every puts the teacher ({settings.model.variant}) in the place of gram.anchor "
            f"({anchor.card.variant}); both must be of one variant"
        )
    if anchor.in_channels != backbone.in_channels or anchor.patch_size != backbone.patch_size:
        raise ConfigError(
            f"gram.anchor {settings.gram.anchor} has {anchor.in_channels} bands and patch "
            f"{anchor.patch_size}; the run has {backbone.in_channels} bands and patch {backbone.patch_size}"
        )
    return anchor


class Trainer:
    """One run: networks, optimiser, data position and files."""

    def __init__(self, settings: TrainSettings, out: Path) -> None:
        """Builds everything at step 0.

        Args:
            settings: of the run.
            out: its folder.
        """
        self.settings = settings
        self.out = out
        self.device = resolve_device(settings.device)
        self.normalization = run_normalization(settings)
        self.crop_maker = build_crop_maker(settings)
        self.datasets = open_sources(settings.data)
        check_bands(self.datasets, settings.data)
        self.recipe = build_recipe(settings).to(self.device)
        self.optimizer = build_optimizer(self.recipe.student, settings.optimizer)
        self.step = 0

    def start_from(self, path: Path) -> None:
        """Takes networks and optimiser from another run; steps and schedules begin anew."""
        checkpoint = checkpoints.locate_checkpoint(path)
        checkpoints.load_networks(checkpoint, self.recipe, with_anchor=False)
        checkpoints.load_optimizer(checkpoint, self.optimizer)

    def resume(self) -> None:
        """Goes on after this run's latest checkpoint.

        Raises:
            ConfigError: the settings differ from those of the run.
        """
        checkpoint = checkpoints.locate_checkpoint(self.out)
        state = checkpoints.read_state(checkpoint)
        changed = changed_keys(state["settings"], self.settings.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"--resume with other settings than the run in {self.out}: {'; '.join(changed)}. "
                "Use the run's own settings, or start a new run with --set start_from"
            )
        checkpoints.load_networks(checkpoint, self.recipe, with_anchor=True)
        checkpoints.load_optimizer(checkpoint, self.optimizer)
        self.recipe.num_refreshes = state["num_refreshes"]
        self.step = state["step"]
        _drop_lines_after(self.out / METRICS_FILE, self.step)

    def save(self) -> None:
        """Writes a checkpoint and the teacher's backbone with its card."""
        state = {
            "step": self.step,
            "num_refreshes": self.recipe.num_refreshes,
            "settings": self.settings.model_dump(mode="json"),
        }
        checkpoints.save_checkpoint(
            self.out, self.recipe, self.optimizer, state, keep=self.settings.checkpoints.keep_last
        )
        self.export()

    def export(self) -> None:
        """Writes the teacher's backbone with its card."""
        teacher = self.recipe.teacher["backbone"]
        assert isinstance(teacher, VisionTransformer)
        dtype = getattr(torch, self.settings.export.dtype)
        save_backbone(self.out / RUN_EXPORT, teacher, self.card(), dtype=dtype)

    def card(self) -> BackboneCard:
        """What a user of the exported weights must know."""
        sizes = [dataset.gsd_range_m for dataset in self.datasets if isinstance(dataset, SceneDataset)]
        export = self.settings.export
        return BackboneCard(
            name=self.settings.name,
            variant=self.settings.model.variant,
            patch_size=self.settings.model.patch_size,
            normalization=self.normalization,
            gsd_m=_round_outwards(sizes),
            trained_on=export.trained_on or tuple(source.path for source in self.settings.data.sources),
            licence=export.licence,
            notes=export.notes,
            recipe={
                "steps": self.step,
                "commit": _commit(),
                "settings": self.settings.model_dump(mode="json", exclude={"data": {"root"}, "export": True}),
            },
        )

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimiser step.

        Args:
            batch: `image` [B, C, S, S] and `valid` [B, S, S] on the device.

        Returns:
            Loss terms, their weighted `loss` and gradient norms, as scalars on the device.
        """
        settings, step = self.settings, self.step
        crops = self.crop_maker(
            batch["image"], batch["valid"], seed=step_seed(settings.seed, step, _SEED_CROPS)
        )
        torch.manual_seed(step_seed(settings.seed, step, _SEED_NETWORK))
        schedules = settings.schedules
        set_rates(
            self.optimizer,
            lr=schedules.lr.at(step, settings.steps),
            weight_decay=schedules.weight_decay.at(step, settings.steps),
            freeze_last_layer=step < settings.optimizer.freeze_last_layer_steps,
        )
        enabled = settings.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            terms = self.recipe.losses(
                crops, teacher_temperature=schedules.teacher_temperature.at(step, settings.steps)
            )
        weights = self.recipe.weights(step, settings.steps, num_locals=settings.crops.local_count)
        loss = torch.stack([value * weights[name] for name, value in terms.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = clip_per_module(self.recipe.student.named_children(), settings.optimizer.clip_norm)
        # Before the step: a finite loss with a gradient that is not would poison student and teacher.
        if not bool(torch.isfinite(torch.stack([loss.detach(), *norms.values()])).all()):
            names = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
            raise DataError(
                f"loss or gradient is not finite in step {step} ({', '.join(names) or 'gradient'}); the last "
                "checkpoint is kept: lower schedules.lr, raise batch_size or look for corrupt pixels, "
                "then go on with --resume"
            )
        self.optimizer.step()
        self.recipe.after_step(step, momentum=schedules.momentum.at(step, settings.steps))
        self.step += 1
        norms = {f"grad_norm/{name}": value for name, value in norms.items()}
        return {"loss": loss.detach(), **{n: v.detach() for n, v in terms.items()}, **norms}

    def run(self, progress: Progress | None = None) -> RunResult:
        """Trains to the last step, or until SIGTERM or Ctrl-C asks to stop after the current one."""
        settings = self.settings
        self.recipe.train()
        loader = iter(
            chip_loader(
                self.datasets,
                settings.data,
                batch_size=settings.batch_size,
                seed=settings.seed,
                start=self.step * settings.batch_size,
            )
        )
        metrics: dict[str, float] = {}
        clock = _Clock()
        with _stop_requests() as stop_asked:
            while self.step < settings.steps and not stop_asked():
                batch = {
                    name: tensor.to(self.device, non_blocking=True) for name, tensor in next(loader).items()
                }
                clock.data_arrived()
                values = self.train_step(batch)
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    metrics = {name: float(value) for name, value in values.items()}
                    self._log(metrics | clock.rates(settings.batch_size))
                if self.step % settings.checkpoints.every == 0 or self.step == settings.steps:
                    self.save()
                if progress is not None:
                    progress(self.step, settings.steps, metrics)
                clock.step_done()
        if self.step < settings.steps:
            self.save()
        stopped_by = stop_asked() if self.step < settings.steps else None
        return RunResult(self.step, stopped_by, self.out / RUN_EXPORT, metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        rates = {"lr": self.settings.schedules.lr.at(self.step - 1, self.settings.steps)}
        with (self.out / METRICS_FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": self.step, **rates, **metrics}) + "\n")


class _Clock:
    """Time per step and the share of it spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self._last = self._since = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def data_arrived(self) -> None:
        self._waited += time.perf_counter() - self._last

    def step_done(self) -> None:
        self._steps += 1
        self._last = time.perf_counter()

    def rates(self, batch_size: int) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = now - self._since
        rates = {
            "images_per_s": (self._steps + 1) * batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self._since, self._waited, self._steps = now, 0.0, -1
        return rates


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], int | None]]:
    """Turns SIGTERM and SIGINT into a question that the loop asks between steps."""
    asked: int | None = None

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ and matter, as `key: old -> new`."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return [
        f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in _FREE_ON_RESUME)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _drop_lines_after(path: Path, step: int) -> None:
    """Forgets what was logged after the checkpoint: those steps will be made again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A killed run can leave half a line at the end.
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _round_outwards(ranges: list[tuple[float, float]]) -> tuple[float, float] | None:
    """Range over all sources; pixel sizes carry rounding noise in their ninth digit."""
    if not ranges:
        return None
    return round(min(low for low, _ in ranges), 6), round(max(high for _, high in ranges), 6)


def _commit() -> str:
    """Commit of the code, or "unknown" outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def check_out(out: Path, *, resume: bool) -> list[Path]:
    """The checkpoints that `out` already holds.

    Raises:
        ConfigError: there are some, and the run is not to go on from them.
    """
    existing = checkpoints.list_checkpoints(out)
    if existing and not resume:
        raise ConfigError(
            f"{out} already holds a run ({existing[-1].name}); go on with --resume or name another --out"
        )
    return existing


def pretrain(
    settings: TrainSettings, *, out: Path, resume: bool = False, progress: Progress | None = None
) -> RunResult:
    """Runs a configuration.

    Args:
        settings: of the run.
        out: folder for checkpoints, metrics and weights.
        resume: go on from the latest checkpoint in `out`; begins at step 0 if there is none yet.
        progress: called after every step with step, total and the latest metrics.

    Raises:
        ConfigError: `out` already holds a run and `resume` is false, or the settings do not fit it.
    """
    existing = check_out(out, resume=resume)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trainer = Trainer(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    if existing:
        trainer.resume()
    else:
        (out / METRICS_FILE).unlink(missing_ok=True)
        if settings.start_from is not None:
            trainer.start_from(settings.start_from)
    if trainer.step == settings.steps:
        trainer.export()
    temporary = out / "settings.json.tmp"
    temporary.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / "settings.json")
    return trainer.run(progress)
