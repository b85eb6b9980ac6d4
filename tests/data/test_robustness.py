"""Damaged files, and what lies at pixels without data."""

import itertools
import os

import numpy as np
import pytest
import torch

from dinov3geo.data.mixture import DataSettings, chip_loader, open_sources
from dinov3geo.errors import DataError, RasterError
from dinov3geo.training.settings import TrainSettings
from dinov3geo.training.trainer import Trainer

HEAD = {"hidden": 32, "bottleneck": 16, "prototypes": 32}


@pytest.fixture
def damaged(write_raster, tmp_path):
    """Two scenes, one of which loses the middle of its blocks after its header was read."""
    write_raster("s/a.tif", shape=(3, 96, 96), compress="deflate", tiled=True, blockxsize=16, blockysize=16)
    far = (500_000.0, 3_280_000.0)
    bad = write_raster(
        "s/b.tif", shape=(3, 96, 96), origin=far, compress="deflate", tiled=True, blockxsize=16, blockysize=16
    )

    def settings(**more):
        return DataSettings(root=tmp_path / "s", chip_size=32, workers=0, **more)

    datasets = open_sources(settings())
    content = bytearray(bad.read_bytes())
    # The directory stays, a third of the blocks goes.
    start, stop = len(content) // 3, 2 * len(content) // 3
    content[start:stop] = bytes(stop - start)
    bad.write_bytes(content)
    return settings, datasets


def test_a_file_damaged_in_the_middle_ends_the_run_in_one_line(damaged):
    settings, datasets = damaged
    with pytest.raises(DataError, match=r"cannot read .*b\.tif at rows .*damaged or truncated") as caught:
        list(itertools.islice(chip_loader(datasets, settings(), batch_size=8, seed=0), 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_or_is_left_out_and_counted(damaged, workers):
    settings, datasets = damaged
    told = []
    config = settings(unreadable="skip").model_copy(update={"workers": workers})
    loader = chip_loader(datasets, config, batch_size=8, seed=0, warn=told.append)
    batches = list(itertools.islice(loader, 4))
    assert all(set(batch) == {"image", "valid"} for batch in batches)
    # Of both scenes alike chips were drawn; other keys stand in for those that failed.
    assert sum(float(batch["valid"].any(-1).any(-1).float().mean()) for batch in batches) > 3
    assert len(told) == 1 and "b.tif" in told[0] and "1 failed reads so far" in told[0]
    again = chip_loader(datasets, config, batch_size=8, seed=0, start=16)
    assert torch.equal(next(again)["image"], batches[2]["image"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write_raster):
    scene = write_raster("s/a.tif")
    scene.chmod(0)
    with pytest.raises(RasterError, match=r"a\.tif cannot be opened"):
        open_sources(DataSettings(root=scene.parent))


def test_what_lies_at_pixels_without_data_never_reaches_a_loss(write_raster, tmp_path):
    """One step: loss, gradients and weights are the same bits whatever invalid pixels hold."""
    write_raster("s/a.tif", shape=(3, 96, 96))
    settings = TrainSettings.model_validate(
        {
            "steps": 1,
            "batch_size": 4,
            "threads": 1,
            "model": {"variant": "vit_tiny"},
            "data": {"root": str(tmp_path / "s"), "chip_size": 64, "workers": 0},
            "crops": {"global_size": 48, "local_size": 32, "local_count": 2},
            "losses": {"dino_head": HEAD, "ibot_head": HEAD},
        }
    )
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))
    valid = torch.ones(4, 64, 64, dtype=torch.bool)
    valid[0, :30] = valid[1, 20:40, 20:50] = valid[2, :, 50:] = False
    results = []
    for poison in (0, 255, rng.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)):
        poisoned = torch.where(valid[:, None], image, torch.as_tensor(poison, dtype=torch.uint8))
        trainer = Trainer(settings, tmp_path / "run")
        values = trainer.train_step({"image": poisoned, "valid": valid})
        gradients = [p.grad for p in trainer.recipe.student.parameters() if p.grad is not None]
        weights = list(trainer.recipe.student.parameters())
        results.append((list(values.values()), gradients, weights))
    for other in results[1:]:
        for one_part, other_part in zip(results[0], other, strict=True):
            assert len(one_part) == len(other_part) > 0
            assert all(torch.equal(a, b) for a, b in zip(one_part, other_part, strict=True))
