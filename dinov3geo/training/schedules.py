"""Schedules of a number over training steps."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Schedule(BaseModel):
    """Linear warm-up from `start` to `peak`, cosine from `peak` to `end`, then constant.

    A bare number in YAML is a constant. With `cosine_steps: 0` the value stays at `peak` for ever: the
    constant plateau from which later stages can branch at any step.

    Source: DINOv3 (constant schedules, section on optimisation); shape as in its configurations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peak: float
    start: float | None = Field(None, description="at step 0; peak if absent")
    end: float | None = Field(None, description="after the cosine; peak if absent")
    warmup_steps: int = Field(0, ge=0)
    cosine_steps: int | None = Field(None, ge=0, description="all remaining steps if absent")
    begin: int = Field(0, ge=0, description="step at which the warm-up begins, where stages keep the count")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:  # noqa: ANN401 (pydantic hands over whatever stood in YAML)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"peak": value}
        return value

    def at(self, step: int, total_steps: int) -> float:
        """Value in a step.

        Args:
            step: from 0.
            total_steps: of the run; where the cosine ends if `cosine_steps` is absent.
        """
        step, total_steps = max(step - self.begin, 0), max(total_steps - self.begin, 0)
        start = self.peak if self.start is None else self.start
        end = self.peak if self.end is None else self.end
        if step < self.warmup_steps:
            return start + (self.peak - start) * step / self.warmup_steps
        remaining = total_steps - self.warmup_steps
        length = remaining if self.cosine_steps is None else self.cosine_steps
        if length <= 0:
            return self.peak
        share = min((step - self.warmup_steps) / length, 1.0)
        return end + (self.peak - end) * (1 + math.cos(math.pi * share)) / 2
