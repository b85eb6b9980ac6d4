"""The recipe's arithmetic against references written by hand from the formulas, in float64 with loops.

Each loss with its gradient, Sinkhorn-Knopp, the schedules, the mask counts, the rotary table, the weights of
the terms, the parameter groups, and one whole step of AdamW, clipping and moving average. Prints the largest
difference of each and ends with status 1 if one is above its bound.

    python benchmarks/recipe_numbers.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinov3geo.backbones.rope import RotaryEmbedding
from dinov3geo.backbones.variants import build_vit
from dinov3geo.data.masking import MaskSettings, batch_masks, masked_counts
from dinov3geo.losses.dino import dino_loss
from dinov3geo.losses.gram import gram_loss
from dinov3geo.losses.ibot import ibot_loss, mask_weights
from dinov3geo.losses.koleo import koleo_loss
from dinov3geo.losses.sinkhorn import sinkhorn_knopp
from dinov3geo.training.optimizer import OptimizerSettings, build_optimizer, clip_per_module, set_rates
from dinov3geo.training.projection import ProjectionHead, ProjectionSettings
from dinov3geo.training.schedules import Schedule
from dinov3geo.training.ssl import GramSettings, LossSettings, SelfSupervisedRecipe

Check = Callable[[], float]
Loss = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks; 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the differences")
    options = parser.parse_args(arguments)
    results = {name: (check(), bound) for name, (check, bound) in CHECKS.items()}
    for name, (difference, bound) in results.items():
        print(f"{name:<44} {difference:9.2e}  {'ok' if difference <= bound else 'ABOVE'} {bound:.0e}")
    if options.json is not None:
        text = json.dumps({name: difference for name, (difference, _) in results.items()}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return int(any(difference > bound for difference, bound in results.values()))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _with_gradient(
    ours: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor
) -> float:
    """Largest difference of value and gradient; the reference gets float64."""
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    value, expected = ours(single), reference(double)
    value.backward()
    expected.backward()
    assert single.grad is not None and double.grad is not None
    return max(abs(float(value.detach()) - float(expected.detach())), _difference(single.grad, double.grad))


def _sinkhorn() -> float:
    logits, tau = _random(24, 10), 0.07
    q = torch.exp(logits.double() / tau).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    return _difference(sinkhorn_knopp(logits, tau), (q * samples).T)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    scaled = logits / 0.1
    return -(target * (scaled - scaled.exp().sum().log())).sum()


def _dino(*, diagonal: bool) -> float:
    students = 2 if diagonal else 8
    targets = _random(2, 3, 12, seed=1).softmax(-1)

    def reference(x: Tensor) -> Tensor:
        terms = [
            _cross_entropy(x[s, b], targets[t, b].double())
            for s in range(students)
            for t in range(2)
            for b in range(3)
            if not (diagonal and s == t)
        ]
        return torch.stack(terms).sum() / (2 * 3 if diagonal else 3 * 16)

    return _with_gradient(
        lambda x: dino_loss(x, targets, ignore_diagonal=diagonal), reference, _random(students, 3, 12)
    )


def _ibot() -> float:
    masks = torch.from_numpy(batch_masks(np.ones((8, 64), dtype=bool), (8, 8), MaskSettings(), seed=3))
    count = int(masks.sum())
    targets = _random(count, 9, seed=2).softmax(-1)

    def reference(x: Tensor) -> Tensor:
        total, row = x.new_zeros(()), 0
        for mask in masks:
            own = int(mask.sum())
            for _ in range(own):
                total = total + _cross_entropy(x[row], targets[row].double()) / own
                row += 1
        return total / len(masks)  # those without a mask count too

    return _with_gradient(
        lambda x: ibot_loss(x, targets, mask_weights(masks), num_images=8), reference, _random(count, 9)
    )


def _koleo() -> float:
    def reference(x: Tensor) -> Tensor:
        unit = torch.stack([row / row.norm() for row in x])
        terms = []
        for i in range(len(x)):
            others = [j for j in range(len(x)) if j != i]
            nearest = max(others, key=lambda j: float(unit[i] @ unit[j]))
            terms.append(-torch.log((unit[i] - unit[nearest] + 1e-8).norm() + 1e-8))
        return torch.stack(terms).mean()

    return _with_gradient(koleo_loss, reference, _random(10, 6))


def _gram() -> float:
    anchor = _random(3, 7, 5, seed=4)

    def reference(x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for image, kept in zip(x, anchor.double(), strict=True):
            for i in range(7):
                for j in range(7):
                    own = image[i] @ image[j] / (image[i].norm() * image[j].norm())
                    other = kept[i] @ kept[j] / (kept[i].norm() * kept[j].norm())
                    total = total + (own - other) ** 2
        return total / (3 * 7 * 7)

    return _with_gradient(lambda x: gram_loss(x, anchor), reference, _random(3, 7, 5))


def _schedule() -> float:
    total, warm = 1000, 100
    warmup = [0.0 + (2.0 - 0.0) * step / warm for step in range(warm)]
    cosine = [
        0.5 + 0.5 * (2.0 - 0.5) * (1 + math.cos(math.pi * s / (total - warm))) for s in range(total - warm)
    ]
    ours = Schedule(start=0.0, peak=2.0, end=0.5, warmup_steps=warm)
    values = [ours.at(step, total) for step in range(total)]
    return max(abs(a - b) for a, b in zip(values, warmup + cosine, strict=True))


def _mask_counts() -> float:
    golden = [51, 76, 102, 128, 0, 0, 0, 0]
    counts = masked_counts(8, 256, MaskSettings())
    masks = batch_masks(np.ones((8, 256), dtype=bool), (16, 16), MaskSettings(), seed=1)
    return float(counts != golden) + float(sorted(masks.sum(1).tolist()) != sorted(golden))


def _rope() -> float:
    rows, cols, width = 5, 7, 64
    cos, sin = RotaryEmbedding(width).tables((rows, cols), num_prefix=0, training=False, like=torch.zeros(1))
    worst = 0.0
    for y in range(rows):
        for x in range(cols):
            place = (2 * (y + 0.5) / rows - 1, 2 * (x + 0.5) / cols - 1)
            for k in range(width // 2):
                axis, i = divmod(k, width // 4)
                angle = 2 * math.pi * place[axis] / 100 ** (4 * i / width)
                row = y * cols + x
                worst = max(worst, abs(float(cos[row, k]) - math.cos(angle)))
                worst = max(worst, abs(float(sin[row, k + width // 2]) - math.sin(angle)))
    return worst


def _term_weights() -> float:
    recipe = _recipe()
    weights = recipe.weights(0, 10, num_locals=8)
    expected = {"dino_global": 2 / 18, "dino_local": 16 / 18, "ibot": 1.0, "koleo": 0.1}
    return max(abs(weights[name] - value) for name, value in expected.items())


def _recipe() -> SelfSupervisedRecipe:
    torch.manual_seed(0)
    backbone = build_vit("vit_tiny", layer_scale=0.1)
    del backbone.blocks[2:]
    head = ProjectionSettings(hidden=16, bottleneck=8, prototypes=12)
    return SelfSupervisedRecipe(backbone, LossSettings(dino_head=head, ibot_head=head), GramSettings())


def _head() -> float:
    head = ProjectionHead(6, ProjectionSettings(hidden=8, bottleneck=4, prototypes=5))
    x = _random(3, 6)
    y = x.double()
    linears = [module for module in head.mlp if isinstance(module, nn.Linear)]
    for number, linear in enumerate(linears):
        bias = 0.0 if linear.bias is None else linear.bias.double()
        y = y @ linear.weight.double().T + bias
        if number < len(linears) - 1:
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    y = y / y.norm(dim=-1, keepdim=True)
    return _difference(head(x), y @ head.prototypes.weight.double().T)


def _whole_step() -> float:
    """Clipping by module, AdamW by group, moving average: all parameters after two steps."""
    recipe = _recipe()
    settings = OptimizerSettings(clip_norm=0.5, layer_decay=0.9, patch_embed_factor=0.2, betas=(0.9, 0.99))
    optimizer = build_optimizer(recipe.student, settings)
    lr, decay, momentum = 1e-2, 0.04, 0.9
    student = {n: p.detach().double().clone() for n, p in recipe.student.named_parameters()}
    teacher = {n: t.clone() for n, t in student.items()}
    first, second = ({n: torch.zeros_like(t) for n, t in student.items()} for _ in range(2))
    for step in (1, 2):
        gradients = {
            name: 0.01 * _random(*parameter.shape, seed=step * 1000 + number)
            for number, (name, parameter) in enumerate(recipe.student.named_parameters())
        }
        for name, parameter in recipe.student.named_parameters():
            parameter.grad = gradients[name].clone()
        set_rates(optimizer, lr=lr, weight_decay=decay, freeze_last_layer=False)
        clip_per_module(recipe.student.named_children(), settings.clip_norm)
        optimizer.step()
        recipe.after_step(step, momentum=momentum)
        for module in recipe.student:
            own = [name for name in student if name.startswith(f"{module}.")]
            norm = math.sqrt(sum(float(gradients[n].double().square().sum()) for n in own))
            for name in own:
                gradient = gradients[name].double() * min(1.0, 0.5 / (norm + 1e-6))
                rate, share = lr * _rate_factor(name), decay * _decay_factor(name)
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.99 * second[name] + 0.01 * gradient**2
                hat_first, hat_second = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
                student[name] = student[name] * (1 - rate * share) - rate * hat_first / (
                    hat_second.sqrt() + 1e-8
                )
                teacher[name] = momentum * teacher[name] + (1 - momentum) * student[name]
    return max(
        max(_difference(p, student[n]) for n, p in recipe.student.named_parameters()),
        max(_difference(p, teacher[n]) for n, p in recipe.teacher.named_parameters()),
    )


def _rate_factor(name: str) -> float:
    """Depth 2: tokens and stem are layer 0, block i is i + 1, all else 3."""
    if not name.startswith("backbone."):
        return 1.0
    part = name.split(".")[1]
    if part == "blocks":
        return float(0.9 ** (3 - int(name.split(".")[2]) - 1))
    if part == "norm":
        return 1.0
    return float(0.9**3) * (0.2 if part == "patch_embed" else 1.0)


def _decay_factor(name: str) -> float:
    last = name.split(".")[-1]
    return 0.0 if last.endswith("bias") or "norm" in name or last.startswith("scale") else 1.0


CHECKS: dict[str, tuple[Check, float]] = {
    "Sinkhorn-Knopp": (_sinkhorn, 1e-5),
    "DINO, global, without diagonal": (lambda: _dino(diagonal=True), 1e-5),
    "DINO, local": (lambda: _dino(diagonal=False), 1e-5),
    "iBOT": (_ibot, 1e-5),
    "KoLeo": (_koleo, 1e-5),
    "Gram": (_gram, 1e-6),
    "schedule": (_schedule, 1e-12),
    "mask counts 51, 76, 102, 128 and four zeros": (_mask_counts, 0.0),
    "rotary table": (_rope, 1e-5),
    "weights of the terms, 2/18 and 16/18": (_term_weights, 1e-12),
    "projection head": (_head, 1e-6),
    "two steps of clipping, AdamW and average": (_whole_step, 1e-6),
}

if __name__ == "__main__":
    sys.exit(main())
