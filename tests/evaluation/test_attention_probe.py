"""Attention pooling: against loops, torch's own attention and a mean; one patch decides."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dinov3geo.backbones.zoo import load_backbone
from dinov3geo.evaluation.attention_probe import (
    AttentionPooling,
    attention_scores,
    choose_attention,
    fit_attention,
    num_heads,
)
from dinov3geo.evaluation.classification import ClassificationSettings, evaluate_encoder, main_score
from dinov3geo.evaluation.encoders import BackboneEncoder, ColourStatistics, encode_patches
from dinov3geo.evaluation.image_sets import ImageSet, split_images


def probe(dim=8, classes=3, heads=2, seed=0):
    torch.manual_seed(seed)
    made = AttentionPooling(dim, classes, num_heads=heads)
    nn.init.normal_(made.query)
    made.mean.normal_()
    made.scale.uniform_(0.5, 2)
    return made.requires_grad_(False)


def test_scores_equal_a_loop():
    made, patches = probe(), torch.randn(2, 5, 8)
    for image, scores in zip(patches, made(patches), strict=True):
        rows = (image - made.mean) * made.scale
        pooled = torch.zeros(8)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            weights = [math.exp(float(made.key(r)[part] @ made.query[part]) / 2) for r in rows]
            for weight, row in zip(weights, rows, strict=True):
                pooled[part] += weight / sum(weights) * made.value(row)[part]
        torch.testing.assert_close(scores, made.score(pooled), rtol=1e-4, atol=1e-5)


def test_scores_equal_torchs_multi_head_attention():
    made, patches = probe(), torch.randn(2, 5, 8)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    eye = torch.eye(8)
    theirs.in_proj_weight.copy_(torch.cat([eye, made.key.weight, made.value.weight]))
    theirs.in_proj_bias.copy_(torch.cat([torch.zeros(8), made.key.bias, made.value.bias]))
    theirs.out_proj.weight.copy_(eye)
    theirs.out_proj.bias.zero_()
    rows = (patches - made.mean) * made.scale
    pooled, _ = theirs(made.query.expand(2, 1, 8), rows, rows)
    torch.testing.assert_close(made(patches), made.score(pooled[:, 0]))


def test_a_query_of_zero_gives_the_mean_and_the_order_of_patches_says_nothing():
    made, patches = probe(), torch.randn(2, 5, 8)
    torch.testing.assert_close(made(patches), made(patches[:, torch.randperm(5)]))
    made.query.zero_()
    mean = ((patches - made.mean) * made.scale).mean(1)
    torch.testing.assert_close(made(patches), made.score(made.value(mean)))
    with pytest.raises(ValueError, match="3 heads do not divide"):
        AttentionPooling(8, 2, num_heads=3)
    assert [num_heads(d) for d in (32, 192, 768, 1000)] == [1, 3, 12, 1]


def marked(count, generator):
    """Images of noise, of which one patch carries the class: a mean over 60 patches drowns it."""
    patches = torch.randn(count, 60, 16, generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    places = torch.randint(0, 60, (count,), generator=generator)
    patches[torch.arange(count), places, 0] = 8.0
    patches[torch.arange(count), places, 1] = 6.0 * (2 * labels - 1)
    return patches, labels


def test_it_learns_where_to_look():
    generator = torch.Generator().manual_seed(0)
    train, validation, test = (marked(n, generator) for n in (300, 60, 100))
    best = choose_attention(
        train, validation, num_classes=2, score=main_score, rates=(1e-5, 1e-2), epochs=12, seed=1
    )
    assert best.rate == 1e-2 and best.score > 0.9
    assert main_score(attention_scores(best.probe, test[0]), test[1]) > 0.9
    again = fit_attention(*train, num_classes=2, rate=1e-2, epochs=12, seed=1)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, best.probe.state_dict()[name], rtol=0, atol=0)


def image_set(sizes):
    generator = np.random.default_rng(0)
    pictures = [
        torch.from_numpy((generator.integers(0, 60, (3, side, side)) + 150 * (k % 2)).astype(np.uint8))
        for k, side in enumerate(sizes)
    ]
    labels = torch.arange(len(sizes)) % 2
    names = tuple(f"{k}.png" for k in range(len(sizes)))
    return ImageSet("made", names, labels, ("dark", "light"), lambda i: pictures[i], stamp=str(sizes))


def test_a_method_of_the_protocol(tmp_path):
    images = image_set([32] * 60)
    settings = ClassificationSettings(
        methods=("knn", "attention"), ks=(3,), attention_rates=(1e-3,), attention_epochs=5, resamples=10
    )
    encoder = BackboneEncoder(load_backbone("vit-tiny-aerial"), size=32)
    split = split_images(images)
    results, notes = evaluate_encoder(encoder, images, split, settings, cache=tmp_path)
    assert [r.method for r in results][-1] == "attention" and not notes
    assert results[-1].scores["accuracy"].value == 1 and results[-1].details == {"learning_rate": 1e-3}
    patches = encode_patches(encoder, images, cache=tmp_path)
    assert patches.shape == (60, 4, 192) and patches.dtype == torch.float16
    results, notes = evaluate_encoder(ColourStatistics(), images, split, settings)
    assert "attention" not in [r.method for r in results]
    assert notes == ["attention was left out: colour statistics has one vector per image"]
    whole = BackboneEncoder(load_backbone("vit-tiny-aerial"), size=None)
    with pytest.raises(ValueError, match="images of different sizes"):
        encode_patches(whole, image_set([32, 48]))
