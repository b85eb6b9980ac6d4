"""A fit that was cut off goes on and ends in the bits of an unbroken one."""

import pytest
import torch

from dinov3geo.heads import epochs
from dinov3geo.heads.classes import ClassFitSettings, ClassObjective
from dinov3geo.heads.fit import FitSample, FitView, fit_head
from dinov3geo.heads.landcover import ClassHeadSettings
from dinov3geo.heads.segmentation import OutputSpec

OUTPUT = OutputSpec("land_cover", class_names=("a", "b"), dtype="uint8", nodata=255)


class Killed(BaseException):
    """Stands for Ctrl-C."""


def samples():
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(6):
        features = torch.randn(4, 5, 5, generator=generator)
        target = (features[0] > 0).to(torch.uint8)
        view = FitView((features,), (5, 5), target, torch.ones(5, 5, dtype=torch.bool))
        found.append(FitSample((view,), 1, f"place{number}"))
    return found


def run(state_file, settings, *, stop_after=None):
    torch.manual_seed(0)
    head = ClassHeadSettings(kind="batchnorm", dropout=0.5).build([4], output=OUTPUT)

    def progress(done, total, loss):
        if done == stop_after:
            raise Killed

    result = fit_head(
        head, samples(), ClassObjective([1, 1]), settings=settings, progress=progress, state_file=state_file
    )
    return head.state_dict(), result


@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_a_killed_fit_ends_in_the_same_bits(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(epochs, "SECONDS_BETWEEN_SAVES", 0.0)
    settings = ClassFitSettings(
        optimizer=optimizer, epochs=8, validation_share=0.3, batch_pixels=50, average_decay=0.5
    )
    whole, expected = run(None, settings)
    file = tmp_path / "state"
    for stop_after in (2, 5):
        with pytest.raises(Killed):
            run(file, settings, stop_after=stop_after)
    found, result = run(file, settings)
    assert result.resumed_epoch == 4 and not list(tmp_path.iterdir())
    assert (result.losses, result.validation_errors) == (expected.losses, expected.validation_errors)
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_another_fit_or_a_damaged_file_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(epochs, "SECONDS_BETWEEN_SAVES", 0.0)
    file = tmp_path / "state"
    with pytest.raises(Killed):
        run(file, ClassFitSettings(epochs=5), stop_after=3)
    assert run(file, ClassFitSettings(epochs=6))[1].resumed_epoch == 0
    file.write_bytes(b"no state")
    assert run(file, ClassFitSettings(epochs=5))[1].resumed_epoch == 0


def test_mixed_precision_fits_too():
    _, result = run(None, ClassFitSettings(epochs=3, precision="bfloat16"))
    assert result.losses[-1] < result.losses[0]
