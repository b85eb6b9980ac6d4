"""Every knob of a pretraining run in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dinov3geo.data.crops import CropSettings
from dinov3geo.data.masking import MaskSettings
from dinov3geo.data.mixture import DataSettings
from dinov3geo.training.optimizer import OptimizerSettings
from dinov3geo.training.schedules import Schedule
from dinov3geo.training.ssl import GramSettings, LossSettings


class ModelSettings(BaseModel):
    """The network that is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = Field("vit_tiny", description="a name from `dinov3geo models`")
    patch_size: int = Field(16, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    layer_scale: float = Field(1e-5, gt=0, description="initial factor of every residual branch")


class ScheduleSettings(BaseModel):
    """Numbers that change over the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: Schedule = Schedule(start=0.0, peak=1e-3, end=1e-6, warmup_steps=100)
    weight_decay: Schedule = Schedule(peak=0.04)
    momentum: Schedule = Schedule(peak=0.996, end=1.0)
    teacher_temperature: Schedule = Schedule(start=0.04, peak=0.07, warmup_steps=300, cosine_steps=0)


class CheckpointSettings(BaseModel):
    """When the state of the run is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(500, gt=0, description="steps")
    keep_last: int = Field(3, gt=0, description="older checkpoints are deleted")


class ExportSettings(BaseModel):
    """What is written beside the teacher's weights for those who use them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    trained_on: tuple[str, ...] = Field((), description="data sets and their licences; the paths if empty")
    licence: str = "not stated"
    notes: str = Field("", description="limits that a user should know")


class TrainSettings(BaseModel):
    """A pretraining run. A stage (gram, high resolution) is another set of these numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("pretrain", description="stands in the card of the weights")
    seed: int = Field(0, ge=0)
    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=1, description="images per step")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward pass; weights and losses stay float32"
    )
    threads: int | None = Field(None, gt=0, description="CPU threads; bits repeat only for one number")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    start_from: Path | None = Field(
        None, description="run folder or checkpoint whose student, teacher, heads and optimiser go on"
    )
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    crops: CropSettings = CropSettings()
    masks: MaskSettings = MaskSettings()
    losses: LossSettings = LossSettings()
    gram: GramSettings = GramSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedules: ScheduleSettings = ScheduleSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
