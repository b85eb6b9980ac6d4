"""Each loss against a naive loop written from its formula, and against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from dinov3geo.losses.dino import dino_loss
from dinov3geo.losses.gram import gram_loss, resize_features
from dinov3geo.losses.ibot import ibot_loss, mask_weights
from dinov3geo.losses.koleo import koleo_loss
from dinov3geo.losses.sinkhorn import sinkhorn_knopp


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> float:
    scaled = [float(value) / temperature for value in logits]
    peak = max(scaled)
    log_sum = peak + math.log(sum(math.exp(value - peak) for value in scaled))
    return -sum(float(t) * (value - log_sum) for t, value in zip(target, scaled, strict=True))


def probabilities(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).softmax(-1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_sinkhorn_equals_the_textbook_loop(generator: torch.Generator) -> None:
    logits = torch.randn(12, 5, generator=generator)
    q = torch.exp(logits.double() / 0.5).T  # [K, N]
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * 5
        q /= q.sum(0, keepdim=True) * 12
    assert torch.allclose(sinkhorn_knopp(logits, 0.5), (q * 12).T.float(), atol=1e-6)


def test_sinkhorn_balances_prototypes(generator: torch.Generator) -> None:
    targets = sinkhorn_knopp(torch.randn(64, 8, generator=generator), 0.5, iterations=50)
    assert torch.allclose(targets.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(targets.sum(0), torch.full((8,), 8.0), atol=1e-3)


def test_sinkhorn_ignores_a_common_shift_and_survives_large_logits(generator: torch.Generator) -> None:
    logits = torch.randn(10, 6, generator=generator)
    assert torch.allclose(sinkhorn_knopp(logits, 0.1), sinkhorn_knopp(logits + 500, 0.1), atol=1e-3)
    assert torch.isfinite(sinkhorn_knopp(logits * 1e4, 0.04)).all()


def test_sinkhorn_keeps_the_target_of_a_sample_far_below_the_largest_logit() -> None:
    logits = torch.zeros(8, 6)
    logits[3] = 50.0
    logits[5, 2] = -40.0
    assert torch.allclose(sinkhorn_knopp(logits, 0.04).sum(1), torch.ones(8), atol=1e-5)


def test_sinkhorn_of_nothing_is_nothing() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 4), 0.1).shape == (0, 4)


@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dino_equals_the_naive_loop(ignore_diagonal: bool, generator: torch.Generator) -> None:
    student = torch.randn(2, 3, 7, generator=generator)
    teacher = probabilities(2, 3, 7, generator=generator)
    terms = [
        cross_entropy(student[s, b], teacher[t, b], 0.1)
        for s in range(2)
        for t in range(2)
        for b in range(3)
        if not (ignore_diagonal and s == t)
    ]
    loss = dino_loss(student, teacher, ignore_diagonal=ignore_diagonal)
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_dino_of_uniform_outputs_is_log_k() -> None:
    loss = dino_loss(torch.zeros(8, 2, 16), torch.full((2, 2, 16), 1 / 16))
    assert float(loss) == pytest.approx(math.log(16), rel=1e-6)


def test_dino_refuses_shapes_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="differ"):
        dino_loss(torch.zeros(2, 2, 16), torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match="at least two global crops"):
        dino_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), ignore_diagonal=True)


def test_ibot_averages_within_images_then_over_all_images(generator: torch.Generator) -> None:
    masks = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    student = torch.randn(4, 5, generator=generator)
    teacher = probabilities(4, 5, generator=generator)
    values = [cross_entropy(s, t, 0.1) for s, t in zip(student, teacher, strict=True)]
    expected = (sum(values[:3]) / 3 + 0 + values[3]) / 3
    loss = ibot_loss(student, teacher, mask_weights(masks), num_images=3)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_ibot_without_masks_is_zero() -> None:
    weights = mask_weights(torch.zeros(2, 4, dtype=torch.bool))
    assert float(ibot_loss(torch.zeros(0, 5), torch.zeros(0, 5), weights, num_images=2)) == 0


def test_koleo_equals_the_naive_loop(generator: torch.Generator) -> None:
    vectors = torch.randn(6, 4, generator=generator)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    nearest = [min(float((unit[i] - unit[j]).norm()) for j in range(6) if j != i) for i in range(6)]
    expected = -sum(math.log(distance) for distance in nearest) / 6
    assert float(koleo_loss(vectors)) == pytest.approx(expected, rel=1e-4)


def test_koleo_of_opposite_vectors_is_minus_log_two() -> None:
    assert float(koleo_loss(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-math.log(2), rel=1e-5)


def test_koleo_of_equal_vectors_is_finite_with_finite_gradient() -> None:
    vectors = torch.ones(3, 4, requires_grad=True)
    koleo_loss(vectors).backward()
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


def test_koleo_of_one_vector_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="batch size"):
        koleo_loss(torch.ones(1, 4))


@pytest.mark.parametrize("per_image", [True, False])
def test_gram_equals_the_naive_loop(per_image: bool, generator: torch.Generator) -> None:
    student = torch.randn(2, 3, 4, generator=generator)
    anchor = torch.randn(2, 3, 5, generator=generator)
    groups = (
        [(student[b], anchor[b]) for b in range(2)]
        if per_image
        else [(student.flatten(0, 1), anchor.flatten(0, 1))]
    )
    squares = []
    for s, a in groups:
        for i in range(len(s)):
            for j in range(len(s)):
                cos_s = float(torch.cosine_similarity(s[i], s[j], dim=0))
                cos_a = float(torch.cosine_similarity(a[i], a[j], dim=0))
                squares.append((cos_s - cos_a) ** 2)
    loss = gram_loss(student, anchor, per_image=per_image)
    assert float(loss) == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_gram_leaves_out_patches_without_data(generator: torch.Generator) -> None:
    student, anchor = torch.randn(1, 5, 4, generator=generator), torch.randn(1, 5, 4, generator=generator)
    valid = torch.tensor([[True, True, True, False, True]])
    kept = [0, 1, 2, 4]
    assert torch.allclose(
        gram_loss(student, anchor, valid=valid), gram_loss(student[:, kept], anchor[:, kept])
    )
    poisoned = student.clone()
    poisoned[0, 3] = 1e6
    assert torch.equal(gram_loss(poisoned, anchor, valid=valid), gram_loss(student, anchor, valid=valid))


def test_gram_is_invariant_to_rotation_of_the_features(generator: torch.Generator) -> None:
    patches = torch.randn(2, 9, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    assert float(gram_loss(patches @ rotation, patches)) < 1e-10


def test_gram_is_exact_under_autocast(generator: torch.Generator) -> None:
    anchor = torch.randn(2, 16, 32, generator=generator)
    student = anchor + 1e-3 * torch.randn(2, 16, 32, generator=generator)
    exact = gram_loss(student, anchor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_loss(student, anchor), exact)


def test_gram_refuses_other_grids() -> None:
    with pytest.raises(ValueError, match="other grids"):
        gram_loss(torch.ones(1, 4, 2), torch.ones(1, 5, 2))


def test_resized_features_of_a_constant_map_stay_constant() -> None:
    patches = torch.full((1, 16, 3), 2.0)
    assert torch.allclose(resize_features(patches, (4, 4), (2, 2)), torch.full((1, 4, 3), 2.0))
    assert resize_features(patches, (4, 4), (4, 4)) is patches
