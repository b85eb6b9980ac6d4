"""The recipe: weights of the terms, teacher, anchor, gradients."""

import copy

import pytest
import torch

from dinov3geo.backbones.card import Normalization
from dinov3geo.backbones.zoo import build_backbone
from dinov3geo.data.crops import CropBatch, CropMaker, CropSettings
from dinov3geo.data.masking import MaskSettings
from dinov3geo.training.optimizer import OptimizerSettings, build_optimizer, clip_per_module, set_rates
from dinov3geo.training.projection import ProjectionSettings
from dinov3geo.training.ssl import GramSettings, LossSettings, SelfSupervisedRecipe

RGB = Normalization(("red", "green", "blue"), (1 / 255,) * 3, (0.0,) * 3, (0.4,) * 3, (0.2,) * 3)
HEAD = ProjectionSettings(hidden=32, bottleneck=16, prototypes=24)


def batch(gram_size: int | None = None) -> CropBatch:
    settings = CropSettings(global_size=64, local_size=32, local_count=3, gram_size=gram_size)
    maker = CropMaker(settings, MaskSettings(), RGB, patch_size=16, nadir=True)
    chips = torch.randint(
        0, 256, (4, 3, 80, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return maker(chips, torch.ones(4, 80, 80, dtype=torch.bool), seed=1)


def recipe(*, anchored: bool = False, **gram: object) -> SelfSupervisedRecipe:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", layer_scale=0.1)
    del backbone.blocks[2:]
    anchor = copy.deepcopy(backbone) if anchored else None
    settings = LossSettings(dino_head=HEAD, ibot_head=HEAD)
    return SelfSupervisedRecipe(backbone, settings, GramSettings(**gram), anchor=anchor).train()  # type: ignore[arg-type]


def test_terms_and_their_weights() -> None:
    parts = recipe()
    terms = parts.losses(batch(), teacher_temperature=0.05)
    assert set(terms) == {"dino_global", "dino_local", "ibot", "koleo"}
    assert all(torch.isfinite(value) and value.ndim == 0 for value in terms.values())
    weights = parts.weights(0, 100, num_locals=8)
    assert weights["dino_global"] == pytest.approx(2 / 18)
    assert weights["dino_local"] == pytest.approx(16 / 18)


def test_koleo_is_summed_over_both_global_crops() -> None:
    from dinov3geo.losses.koleo import koleo_loss

    parts, crops = recipe(), batch()
    parts.student["backbone"].rope.rescale = None
    terms = parts.losses(crops, teacher_temperature=0.05)
    seen = parts.student["backbone"](crops.global_crops.flatten(0, 1), crops.patch_masks)
    expected = koleo_loss(seen.cls[:4]) + koleo_loss(seen.cls[4:])
    assert float(terms["koleo"]) == pytest.approx(float(expected), rel=1e-5)


def test_only_the_student_gets_gradients() -> None:
    parts = recipe(anchored=True)
    terms = parts.losses(batch(), teacher_temperature=0.05)
    torch.stack(list(terms.values())).sum().backward()
    missing = [n for n, p in parts.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert parts.anchor is not None
    frozen = [*parts.teacher.parameters(), *parts.anchor.parameters()]
    assert all(p.grad is None for p in frozen)


def test_gram_is_zero_only_while_the_student_is_the_anchor() -> None:
    parts = recipe(anchored=True)
    parts.student.eval()
    crops = batch()
    unmasked = CropBatch(
        crops.global_crops, crops.local_crops, None, torch.zeros_like(crops.patch_masks), crops.patch_valid
    )
    assert float(parts.losses(unmasked, teacher_temperature=0.05)["gram"]) < 1e-10
    torch.nn.init.normal_(parts.student["backbone"].patch_embed.weight)
    assert float(parts.losses(unmasked, teacher_temperature=0.05)["gram"]) > 1e-4


def test_gram_crops_may_be_larger() -> None:
    terms = recipe(anchored=True).losses(batch(gram_size=128), teacher_temperature=0.05)
    assert torch.isfinite(terms["gram"])


def test_teacher_moves_by_the_momentum() -> None:
    parts = recipe()
    before = parts.teacher["backbone"].cls_token.clone()
    with torch.no_grad():
        parts.student["backbone"].cls_token.add_(1.0)
    parts.after_step(0, momentum=0.9)
    assert torch.allclose(parts.teacher["backbone"].cls_token, before + 0.1, atol=1e-6)


def test_anchor_is_renewed_on_its_period_and_not_more_often_than_allowed() -> None:
    parts = recipe(anchored=True, refresh_every=2, max_refreshes=1)
    assert parts.anchor is not None
    with torch.no_grad():
        parts.teacher["backbone"].cls_token.fill_(5.0)
    parts.after_step(0, momentum=1.0)
    assert parts.num_refreshes == 0
    parts.after_step(1, momentum=1.0)
    assert torch.equal(parts.anchor.cls_token, parts.teacher["backbone"].cls_token)
    parts.after_step(3, momentum=1.0)
    assert parts.num_refreshes == 1


def test_optimizer_groups_follow_the_rules() -> None:
    parts = recipe()
    optimizer = build_optimizer(parts.student, OptimizerSettings(layer_decay=0.5, patch_embed_factor=0.2))
    set_rates(optimizer, lr=1.0, weight_decay=0.1, freeze_last_layer=True)
    rates = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["names"]}
    assert len(rates) == len(list(parts.student.parameters()))
    assert rates["backbone.norm.weight"] == (1.0, 0.0)
    assert rates["backbone.blocks.1.ffn.up.weight"] == (0.5, 0.1)
    assert rates["backbone.blocks.0.scale1"] == (0.25, 0.0)
    assert rates["backbone.blocks.0.attention.query_bias"] == (0.25, 0.0)
    assert rates["backbone.cls_token"] == (0.125, 0.1)
    assert rates["backbone.patch_embed.weight"] == pytest.approx((0.025, 0.1))
    assert rates["dino_head.mlp.0.weight"] == (1.0, 0.1)
    assert rates["dino_head.prototypes.weight"] == (0.0, 0.1)


def test_clipping_is_per_module() -> None:
    parts = recipe()
    for name, parameter in parts.student.named_parameters():
        parameter.grad = torch.full_like(parameter, 1.0 if name.startswith("dino_head") else 1e-6)
    norms = clip_per_module(parts.student.named_children(), 3.0)
    assert set(norms) == {"backbone", "dino_head", "ibot_head"}
    assert float(norms["dino_head"]) > 3
    after = torch.cat(
        [p.grad.flatten() for p in parts.student["dino_head"].parameters() if p.grad is not None]
    )
    assert float(after.norm()) == pytest.approx(3.0, rel=1e-4)
    assert float(parts.student["backbone"].cls_token.grad[0, 0, 0]) == pytest.approx(1e-6)


def test_masked_input_and_crops_do_not_depend_on_nodata_numbers() -> None:
    settings = CropSettings(global_size=64, local_size=32, local_count=2, gram_size=64)
    maker = CropMaker(settings, MaskSettings(), RGB, patch_size=16, nadir=True)
    chips = torch.randint(0, 256, (3, 3, 80, 80)).float()
    valid = torch.ones(3, 80, 80, dtype=torch.bool)
    valid[:, 20:50, 30:60] = False
    poisoned = torch.where(valid[:, None], chips, torch.nan)
    clean, dirty = maker(chips, valid, seed=5), maker(poisoned, valid, seed=5)
    assert dirty.gram_crops is not None and clean.gram_crops is not None
    for one, other in zip(
        (clean.global_crops, clean.local_crops, clean.gram_crops),
        (dirty.global_crops, dirty.local_crops, dirty.gram_crops),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert not clean.patch_valid.all()
    assert not (clean.patch_masks & ~clean.patch_valid).any()
