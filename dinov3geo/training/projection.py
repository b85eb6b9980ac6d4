"""The projection head of DINO and iBOT."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class ProjectionSettings(BaseModel):
    """Widths of a projection head; the defaults are those of the published ViT-L recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: int = Field(2048, gt=0)
    bottleneck: int = Field(256, gt=0)
    prototypes: int = Field(65536, gt=1)
    prototype_std: float = Field(
        0.02, gt=0, description="of the initial prototypes; 1 / sqrt(bottleneck) gives them unit length"
    )


class ProjectionHead(nn.Module):
    """MLP to a unit vector, then similarities with prototypes (no bias, no weight norm)."""

    def __init__(self, dim: int, settings: ProjectionSettings) -> None:
        """Builds the head with truncated-normal weights."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, settings.bottleneck),
        )
        self.prototypes = nn.Linear(settings.bottleneck, settings.prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.prototypes.weight, std=settings.prototype_std)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., K]."""
        output: Tensor = self.prototypes(self.bottleneck(x))
        return output

    def bottleneck(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., bottleneck], unit vectors."""
        return F.normalize(self.mlp(x), dim=-1, eps=1e-12)
