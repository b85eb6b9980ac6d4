"""Tiles per forward pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov3geo.backbones.zoo import build_backbone
from dinov3geo.predict.batches import CPU_BATCH, LARGEST, batch_that_fits, fitting_batch, tile_bytes


@given(memory=st.integers(0, 2**38), tile=st.integers(1, 2**36))
def test_half_of_the_memory_holds_the_batch_and_no_larger_one_fits(memory: int, tile: int) -> None:
    batch = fitting_batch(memory, tile)
    assert batch & (batch - 1) == 0
    assert batch == 1 or 2 * batch * tile <= memory
    assert batch == LARGEST or 4 * batch * tile > memory


def test_larger_tiles_and_wider_networks_take_more() -> None:
    with torch.device("meta"):
        tiny, large = build_backbone("vit_tiny"), build_backbone("vit_large")
    assert tile_bytes(tiny, 512) < tile_bytes(tiny, 513) < tile_bytes(large, 513)


def test_on_the_cpu_memory_does_not_matter() -> None:
    assert batch_that_fits(build_backbone("vit_tiny"), 4096) == CPU_BATCH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_batch_chosen_for_a_gpu_fits() -> None:
    backbone = build_backbone("vit_base").cuda().eval()
    batch = batch_that_fits(backbone, 512)
    with torch.inference_mode():
        assert torch.isfinite(backbone(torch.randn(batch, 3, 512, 512, device="cuda")).patches).all()
