"""Numbers that show early how a run goes, and warnings when it goes wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3geo.backbones.features import Features

# Images looked at per logged step: enough for a mean, and cheap.
_MAX_IMAGES = 32
_LINES_BEFORE_WARNING = 3
_LINES_BETWEEN_WARNINGS = 50


def target_statistics(targets: Tensor) -> dict[str, Tensor]:
    """How the teacher spreads a batch over the prototypes.

    Args:
        targets: [N, K], rows sum to 1.

    Returns:
        `teacher_entropy`, of a sample's target as a share of log K: 1 says nothing, 0 is one prototype;
        `prototype_use`, prototypes that are the first choice of a sample, as a share of those that could be.
    """
    entropy = torch.special.entr(targets).sum(1).mean() / math.log(targets.shape[1])
    firsts = targets.argmax(1).unique().numel()
    use = torch.tensor(firsts / min(targets.shape), device=targets.device)
    return {"teacher_entropy": entropy, "prototype_use": use}


def feature_statistics(features: Features) -> dict[str, Tensor]:
    """How the teacher's features lie.

    Args:
        features: of unmasked crops.

    Returns:
        `feature_rank`: the number of directions that the class tokens use, exp of the entropy of their
        singular values (Garrido et al. 2023, RankMe), at most the number of images and the width.
        `patch_similarity`, `patch_similarity_std`: mean and spread of the cosine between patches of an
        image; when dense features decay, all patches become alike.
        `patch_cls_similarity`: mean cosine between the patches and their class token, which grows when
        patches stop saying where they are (Siméoni et al. 2025, DINOv3, figure on dense degradation).
        `patch_norm_ratio`: largest over median norm of a patch; high-norm outliers need registers.
    """
    cls = F.normalize(features.cls.float(), dim=-1)
    values = torch.linalg.svdvals(cls - cls.mean(0)) + 1e-12
    rank = torch.special.entr(values / values.sum()).sum().exp()
    own = features.patches[:_MAX_IMAGES].float()
    patches = F.normalize(own, dim=-1)
    similarity = patches @ patches.mT
    norms = own.norm(dim=-1)
    return {
        "feature_rank": rank,
        "patch_similarity": similarity.mean(),
        "patch_similarity_std": similarity.std(),
        "patch_cls_similarity": (patches @ cls[:_MAX_IMAGES, :, None]).mean(),
        "patch_norm_ratio": norms.max() / norms.median().clamp_min(1e-12),
    }


@dataclass(frozen=True, slots=True)
class Alarm:
    """A number that must stay within bounds.

    Attributes:
        number: name in the metrics.
        low: lowest good value.
        high: highest good value.
        advice: what happened and what to change.
    """

    number: str
    low: float
    high: float
    advice: str


ALARMS = (
    Alarm(
        "feature_rank",
        2.0,
        math.inf,
        "all images have nearly the same features (collapse); lower schedules.lr, raise losses.koleo_weight "
        "or the momentum of the teacher",
    ),
    Alarm(
        "teacher_entropy",
        0.01,
        0.995,
        "the targets hardly tell images apart (near 1: flat; near 0: one prototype each); lower the teacher "
        "temperature or take fewer prototypes with a larger prototype_std where it is near 1, raise the "
        "temperature where it is near 0",
    ),
    Alarm(
        "patch_similarity",
        -1.0,
        0.98,
        "all patches of an image have nearly the same features; raise losses.ibot_weight or go on with a "
        "gram stage from an earlier checkpoint",
    ),
)


@dataclass
class CollapseWatch:
    """Turns numbers out of bounds into warnings, not at the first one and not at every one.

    Attributes:
        quiet_steps: no warning before so many steps: at the start features are alike.
    """

    quiet_steps: int
    _bad: dict[str, int] = field(default_factory=dict)

    def check(self, step: int, numbers: dict[str, float]) -> list[str]:
        """Warnings of a logged step."""
        warnings = []
        for alarm in ALARMS:
            value = numbers.get(alarm.number)
            if value is None or step <= self.quiet_steps or alarm.low <= value <= alarm.high:
                self._bad[alarm.number] = 0
                continue
            self._bad[alarm.number] = count = self._bad.get(alarm.number, 0) + 1
            if (
                count >= _LINES_BEFORE_WARNING
                and (count - _LINES_BEFORE_WARNING) % _LINES_BETWEEN_WARNINGS == 0
            ):
                warnings.append(f"step {step}: {alarm.number} is {value:.3g}: {alarm.advice}")
        return warnings
