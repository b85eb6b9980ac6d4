"""Types of numbers in settings, checked where the YAML is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def _increasing(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"expected the smaller number first, got {list(pair)}")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
_Share = Annotated[float, Field(gt=0, le=1)]
ShareRange = Annotated[tuple[_Share, _Share], AfterValidator(_increasing)]
PositiveRange = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_increasing)
]
