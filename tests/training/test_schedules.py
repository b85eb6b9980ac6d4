"""Schedules against hand-made values."""

import math

import pytest

from dinov3geo.training.schedules import Schedule


def test_a_number_is_a_constant() -> None:
    schedule = Schedule.model_validate(0.04)
    assert [schedule.at(step, 100) for step in (0, 50, 99)] == [0.04] * 3


def test_warmup_leaves_out_its_end_point_and_the_cosine_starts_at_the_peak() -> None:
    schedule = Schedule(start=0.0, peak=1.0, end=0.2, warmup_steps=4)
    assert [schedule.at(step, 12) for step in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert schedule.at(8, 12) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2)
    assert schedule.at(12, 12) == pytest.approx(0.2)
    assert schedule.at(50, 12) == pytest.approx(0.2)


def test_plateau_lasts() -> None:
    schedule = Schedule(start=0.0, peak=1.0, warmup_steps=2, cosine_steps=0)
    assert schedule.at(10**6, 10) == 1.0


def test_constant_follows_a_short_cosine() -> None:
    schedule = Schedule(peak=1.0, end=0.5, cosine_steps=10)
    assert schedule.at(10, 1000) == schedule.at(999, 1000) == pytest.approx(0.5)
