"""Every knob of a pretraining run in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dinov3geo.backbones.filter_bank import count_responses
from dinov3geo.data.crops import CropSettings
from dinov3geo.data.masking import MaskSettings
from dinov3geo.data.mixture import DataSettings
from dinov3geo.data.ranges import PositiveRange
from dinov3geo.training.optimizer import OptimizerSettings
from dinov3geo.training.parallel import ParallelSettings
from dinov3geo.training.schedules import Schedule
from dinov3geo.training.ssl import GramSettings, LossSettings


class ModelSettings(BaseModel):
    """The network that is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str = Field("vit_tiny", description="a name from `dinov3geo models`")
    patch_size: int = Field(16, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    layer_scale: float = Field(1e-5, gt=0, description="initial factor of every residual branch")
    num_registers: int | None = Field(
        None, ge=0, description="register tokens of a vision transformer; the variant's own if absent"
    )
    filters: Path | None = Field(
        None,
        description="weights of `dinov3geo filters` that become the patch embedding of a vision transformer, "
        "in place of one that is learnt; they know textures from the first step on",
    )


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
    keep_every: int | None = Field(None, gt=0, description="those of such steps are kept for ever")


class ExportSettings(BaseModel):
    """What is written beside the teacher's weights for those who use them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    trained_on: tuple[str, ...] = Field((), description="data sets and their licences; the paths if empty")
    licence: str = "not stated"
    gsd_m: PositiveRange | None = Field(
        None, description="lowest and highest pixel size in metres, of images without georeference"
    )
    notes: str = Field("", description="limits that a user should know")


class ResolutionSettings(BaseModel):
    """One choice of a mixture of crop sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    global_size: int = Field(gt=0)
    local_size: int = Field(gt=0)
    gram_size: int | None = Field(None, gt=0)
    probability: float = Field(gt=0, description="relative to the other choices")


class WatchSettings(BaseModel):
    """What is looked at while the run goes on, and when it gives up."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    statistics: bool = Field(True, description="entropies, ranks and similarities beside the losses")
    tensorboard: bool = Field(False, description="event files beside metrics.jsonl (extra `tensorboard`)")
    max_skipped: int = Field(2, ge=0, description="steps in a row with a loss or gradient that is not finite")
    evaluate_every: int | None = Field(None, gt=0, description="steps between evaluations")
    knn: Path | None = Field(None, description="folder of labelled images, one sub-folder per class")
    knn_size: int = Field(64, gt=0, description="side of those images in pixels")
    knn_per_class: int = Field(200, gt=3, description="images of each class; every fourth is asked for")
    knn_hold_out: float = Field(
        0.0, ge=0, lt=1, description="share of those images left out by a hash of their names, as in data"
    )
    dense_images: Path | None = Field(None, description="folder of images for a probe of patches")
    dense_heights: Path | None = Field(None, description="folder of their canopy heights in metres")
    pictures_every: int | None = Field(None, gt=0, description="steps between pictures of the patch features")
    pictures: int = Field(8, gt=0, description="images in a picture")


class RunSettings(BaseModel):
    """What every kind of run has: data, crops, losses, steps and files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("pretrain", description="stands in the card of the weights")
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=1, description="images per step, over all processes")
    accumulate: int = Field(
        1, gt=0, description="parts of a step's images that a process treats one after the other"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward pass; weights and losses stay float32"
    )
    threads: int | None = Field(None, gt=0, description="CPU threads; bits repeat only for one number")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    start_from: Path | None = Field(
        None, description="run folder or checkpoint whose student, teacher, heads and optimiser go on"
    )
    keep_count: bool = Field(
        False, description="with start_from: steps are counted on from there, schedules and data too"
    )
    resolutions: tuple[ResolutionSettings, ...] = Field(
        (), description="crop sizes drawn anew for every step, in place of those of crops"
    )
    data: DataSettings = DataSettings()
    crops: CropSettings = CropSettings()
    masks: MaskSettings = MaskSettings()
    losses: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedules: ScheduleSettings = ScheduleSettings()
    parallel: ParallelSettings = ParallelSettings()
    watch: WatchSettings = WatchSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.keep_count and self.start_from is None:
            raise ValueError("keep_count goes on from start_from, which is not set")
        return self

    def crop_choices(self) -> list[tuple[CropSettings, float]]:
        """Crop settings that a step may use, each with its share of the steps."""
        if not self.resolutions:
            return [(self.crops, 1.0)]
        total = sum(choice.probability for choice in self.resolutions)
        sizes = {"global_size", "local_size", "gram_size"}
        return [
            (self.crops.model_copy(update=choice.model_dump(include=sizes)), choice.probability / total)
            for choice in self.resolutions
        ]


class TrainSettings(RunSettings):
    """A pretraining run. A stage (gram, high resolution) is another set of these numbers."""

    model: ModelSettings = ModelSettings()
    gram: GramSettings = GramSettings()


class StudentSettings(BaseModel):
    """One of the networks that are taught at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        description="of its folder of weights, and before its numbers in metrics.jsonl",
    )
    variant: str = Field(description="a name from `dinov3geo models`")
    patch_size: int | None = Field(
        None, gt=0, description="the teacher's if absent; a ConvNeXt has a stride of its own"
    )
    drop_path: float = Field(0.0, ge=0, lt=1)
    layer_scale: float | None = Field(None, gt=0, description="the variant's own if absent")
    num_registers: int | None = Field(None, ge=0, description="the variant's own if absent")
    filters: Path | None = Field(None, description="see `model.filters` of pretraining")
    lr_factor: float = Field(1.0, gt=0, description="of schedules.lr, for this student")
    processes: int | None = Field(
        None, gt=0, description="that train this student alone; absent: all processes train all in turn"
    )


class KernelSettings(BaseModel):
    """Filters of one size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=1, description="side in pixels, odd")
    count: int = Field(gt=0, description="filters; each gives two numbers")

    @field_validator("size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size % 2 == 0:
            raise ValueError(f"expected an odd side, got {size}")
        return size


class FilterSettings(BaseModel):
    """A filter bank: a network whose weights are computed from images, not trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("filters", description="stands in the card of the weights")
    seed: int = Field(0, ge=0, lt=2**63, description="of the images, and of the patches that become filters")
    data: DataSettings = DataSettings()
    images: int = Field(8000, gt=1, description="chips that the features are whitened over")
    patches: int = Field(20_000, gt=1, description="patches that filters are whitened over, of each size")
    kernels: tuple[KernelSettings, ...] = Field(
        (
            KernelSettings(size=3, count=128),
            KernelSettings(size=5, count=256),
            KernelSettings(size=9, count=256),
        ),
        min_length=1,
    )
    patch_size: int = Field(8, gt=1, multiple_of=2, description="side of a cell of the feature map, pixels")
    embed_dim: int = Field(192, gt=0, description="width of the features")
    ridge: float = Field(
        0.01, gt=0, description="added to the variances of patches (normalised: about 1) that are divided by"
    )
    threshold: float = Field(0.5, ge=0, description="below which a response counts as none")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | None = Field(None, gt=0, description="CPU threads")
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        responses = count_responses(kernel.count for kernel in self.kernels)
        if self.embed_dim > responses:
            raise ValueError(f"embed_dim {self.embed_dim} exceeds the {responses} responses of the kernels")
        if self.embed_dim >= self.images:
            raise ValueError(
                f"{self.images} images differ in fewer than embed_dim {self.embed_dim} directions"
            )
        if self.export.dtype == "bfloat16":
            raise ValueError(
                "filters lose their whitening in bfloat16; use float16 or float32 in export.dtype"
            )
        return self


class DistillSettings(RunSettings):
    """One frozen teacher, several students."""

    teacher: Path = Field(description="run folder or checkpoint with its heads, or weights without heads")
    targets: Literal["prototypes", "features"] = Field(
        "prototypes",
        description="what the students learn: the scores of the teacher's heads, or its features where "
        "weights came without heads",
    )
    feature_map: Literal["linear", "none"] = Field(
        "linear",
        description="what lies between a student's features and the teacher's: a linear map that is thrown "
        "away afterwards, or nothing, so that distances between the student's features are the teacher's; "
        "none needs students of the teacher's width",
    )
    students: tuple[StudentSettings, ...] = Field(min_length=1)
    gram_weight: Schedule = Field(
        Schedule(peak=0.0), description="holds the similarities of patches to the teacher's"
    )

    @model_validator(mode="after")
    def _students_differ(self) -> Self:
        names = [student.name for student in self.students]
        if len(set(names)) < len(names):
            raise ValueError(f"every student needs a name of its own, got {', '.join(names)}")
        if self.feature_map == "none" and self.targets == "prototypes":
            raise ValueError("feature_map: none is for targets: features; prototypes have heads of their own")
        counted = [student.processes is not None for student in self.students]
        if any(counted) and not all(counted):
            raise ValueError("give students.processes for every student, or for none")
        return self
