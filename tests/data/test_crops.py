"""Geometry, photometry and reproducibility of the crops."""

import pytest
import torch

from dinov3geo.backbones.card import Normalization
from dinov3geo.data.crops import (
    CropMaker,
    CropSettings,
    PhotometrySettings,
    cut,
    distort,
    draw_boxes,
    draw_symmetries,
)
from dinov3geo.data.masking import MaskSettings

NO_COLOUR = PhotometrySettings(
    jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probability=(0.0, 0.0, 0.0),
    solarize_probability=(0.0, 0.0, 0.0),
)
IDENTITY = torch.eye(2)[None]
WHOLE = torch.tensor([[0.5, 0.5, 1.0, 1.0]])


def normalization(bands: int) -> Normalization:
    names = tuple(f"b{i}" for i in range(bands))
    return Normalization(names, (1.0,) * bands, (0.0,) * bands, (0.0,) * bands, (1.0,) * bands)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_cutting_the_whole_chip_changes_nothing() -> None:
    chips = torch.rand(1, 3, 32, 32)
    assert torch.allclose(cut(chips, WHOLE, IDENTITY, 32), chips, atol=1e-5)


def test_cutting_a_box_reads_its_pixels() -> None:
    chips = torch.rand(1, 2, 32, 32)
    box = torch.tensor([[0.25, 0.75, 0.5, 0.5]])  # upper right quarter
    assert torch.allclose(cut(chips, box, IDENTITY, 16), chips[:, :, :16, 16:], atol=1e-5)


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::2] = 1.0
    assert torch.allclose(cut(stripes, WHOLE, IDENTITY, 16), torch.full((1, 1, 16, 16), 0.5), atol=1e-5)


def test_nadir_images_meet_all_eight_symmetries() -> None:
    chip = torch.rand(1, 1, 8, 8)
    drawn = draw_symmetries(400, CropSettings(), nadir=True, generator=generator())
    seen = {
        tuple(cut(chip, WHOLE, matrix[None], 8).flatten().mul(1e4).round().int().tolist()) for matrix in drawn
    }
    turned = [torch.rot90(chip, k, (2, 3)) for k in range(4)]
    wanted = {
        tuple(image.flatten().mul(1e4).round().int().tolist())
        for image in turned + [image.flip(3) for image in turned]
    }
    assert len(wanted) == 8
    assert seen == wanted


def test_photographs_are_never_turned_upside_down() -> None:
    drawn = draw_symmetries(200, CropSettings(), nadir=False, generator=generator())
    assert (drawn[:, 1, 1] == 1).all() and (drawn[:, 0, 1] == 0).all()
    assert (drawn[:, 0, 0] == -1).float().mean() == pytest.approx(0.5, abs=0.1)


def test_boxes_lie_inside_and_keep_their_area() -> None:
    boxes = draw_boxes(2000, (0.05, 0.32), (3 / 4, 4 / 3), generator=generator())
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6
    area = boxes[:, 2] * boxes[:, 3]
    assert area.min() >= 0.05 - 1e-5 and area.max() <= 0.32 + 1e-5
    assert float(area.mean()) == pytest.approx(0.185, abs=0.01)


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
def test_any_number_of_bands(bands: int) -> None:
    settings = CropSettings(global_size=32, local_size=16, local_count=3, gram_size=64)
    maker = CropMaker(settings, MaskSettings(), normalization(bands), patch_size=16, nadir=True)
    batch = maker(torch.rand(4, bands, 40, 40), torch.ones(4, 40, 40, dtype=torch.bool), seed=2)
    assert batch.global_crops.shape == (2, 4, bands, 32, 32)
    assert batch.local_crops.shape == (3, 4, bands, 16, 16)
    assert batch.gram_crops is not None and batch.gram_crops.shape == (2, 4, bands, 64, 64)
    assert batch.patch_masks.shape == batch.patch_valid.shape == (8, 4)
    assert all(torch.isfinite(t).all() for t in (batch.global_crops, batch.local_crops, batch.gram_crops))


def test_gram_crops_show_the_same_ground_as_the_global_crops() -> None:
    settings = CropSettings(
        global_size=32,
        global_scale=(0.9, 1.0),
        local_size=16,
        local_count=0,
        gram_size=64,
        photometry=NO_COLOUR,
    )
    maker = CropMaker(settings, MaskSettings(), normalization(1), patch_size=16, nadir=True)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 1, 4, 4), 80, mode="bicubic").clamp(0, 1)
    batch = maker(smooth, torch.ones(2, 80, 80, dtype=torch.bool), seed=3)
    assert batch.gram_crops is not None
    halved = torch.nn.functional.avg_pool2d(batch.gram_crops.flatten(0, 1), 2)
    assert float((halved - batch.global_crops.flatten(0, 1)).abs().max()) < 0.02


def test_the_seed_decides_everything() -> None:
    maker = CropMaker(
        CropSettings(global_size=32, local_size=16, local_count=2),
        MaskSettings(),
        normalization(3),
        patch_size=16,
        nadir=True,
    )
    chips, valid = torch.rand(4, 3, 40, 40), torch.ones(4, 40, 40, dtype=torch.bool)
    one = maker(chips, valid, seed=1)
    torch.manual_seed(5)
    same, other = maker(chips, valid, seed=1), maker(chips, valid, seed=2)
    assert torch.equal(one.global_crops, same.global_crops) and torch.equal(one.patch_masks, same.patch_masks)
    assert not torch.equal(one.global_crops, other.global_crops)


def test_distortions_that_are_off_change_nothing() -> None:
    images = torch.rand(4, 5, 16, 16)
    assert torch.allclose(distort(images, NO_COLOUR, 1, generator=generator(), rgb=False), images, atol=1e-6)


def test_grey_images_have_equal_bands() -> None:
    settings = NO_COLOUR.model_copy(update={"grayscale_probability": 1.0})
    grey = distort(torch.rand(2, 4, 8, 8), settings, 0, generator=generator(), rgb=False)
    assert torch.allclose(grey, grey[:, :1].expand(-1, 4, -1, -1))


def test_crop_sizes_must_fit_the_patch() -> None:
    with pytest.raises(ValueError, match=r"local_size 40 is not a multiple of patch_size 16; use 32 or 48"):
        CropMaker(CropSettings(local_size=40), MaskSettings(), normalization(3), patch_size=16, nadir=True)


def test_numbers_outside_zero_to_one_are_not_clamped() -> None:
    decibels = -25 + 5 * torch.rand(6, 2, 16, 16)
    distorted = distort(decibels, PhotometrySettings(), 1, generator=generator(), rgb=False)
    assert distorted.flatten(2).std(-1).min() > 0.1
    assert distorted.max() < -5


def test_no_crop_is_blank_while_its_chip_holds_data() -> None:
    settings = CropSettings(
        global_size=32, local_size=16, local_count=8, local_scale=(0.02, 0.05), photometry=NO_COLOUR
    )
    maker = CropMaker(settings, MaskSettings(), normalization(1), patch_size=16, nadir=True)
    valid = torch.zeros(4, 40, 40, dtype=torch.bool)
    valid[:, :, 28:] = True
    batch = maker(torch.ones(4, 1, 40, 40), valid, seed=0)
    assert (batch.local_crops.flatten(2).amax(-1) > 0).all()
    assert (batch.global_crops.flatten(2).amax(-1) > 0).all()
