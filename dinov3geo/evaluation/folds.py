"""Places dealt out to folds, so that what overlaps on the ground is never on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dinov3geo.errors import DataError


def balanced_folds(groups: Sequence[str], sizes: Sequence[float], folds: int, *, seed: int) -> list[int]:
    """Deals groups of very different sizes out to folds of about one size.

    The largest group goes first, each into the fold that holds least so far; groups of one size are taken in
    the order of the seed.

    Args:
        groups: of each sample; samples of one group get one fold.
        sizes: of each sample, e.g. its labelled pixels.
        folds: number of parts.
        seed: of the order among equals.

    Returns:
        Fold of each sample, 0 to folds - 1.

    Raises:
        DataError: fewer than 2 folds, or more folds than groups.
    """
    total: dict[str, float] = {}
    for group, size in zip(groups, sizes, strict=True):
        total[group] = total.get(group, 0.0) + size
    if not 2 <= folds <= len(total):
        raise DataError(
            f"{folds} folds were asked for, but {len(total)} separate places (what overlaps is one place) "
            + (f"allow 2 to {len(total)}" if len(total) > 1 else "cannot be split")
        )
    names = sorted(total)
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    shuffled = sorted((names[i] for i in order), key=lambda name: -total[name])
    filled = [0.0] * folds
    fold_of: dict[str, int] = {}
    for name in shuffled:
        lightest = min(range(folds), key=lambda fold: filled[fold])
        fold_of[name] = lightest
        filled[lightest] += max(total[name], 1e-9)
    return [fold_of[group] for group in groups]


def assign_folds(groups: Sequence[str], sites: Sequence[str], folds: int, *, seed: int) -> list[int]:
    """Deals groups out to folds, site by site.

    Args:
        groups: of each plot; plots of one group get one fold.
        sites: of each plot; a group belongs to the site of its first plot.
        folds: number of parts.
        seed: of the draw.

    Returns:
        Fold of each plot, 0 to folds - 1.

    Raises:
        DataError: fewer than 2 folds, or more folds than groups.
    """
    site_of: dict[str, str] = {}
    for group, site in zip(groups, sites, strict=True):
        site_of.setdefault(group, site)
    if not 2 <= folds <= len(site_of):
        raise DataError(
            f"{folds} folds were asked for, but {len(site_of)} separate plots allow 2 to {len(site_of)}"
        )
    generator = np.random.default_rng(seed)
    fold_of: dict[str, int] = {}
    for site in sorted(set(site_of.values())):
        members = sorted(group for group, own in site_of.items() if own == site)
        for position in generator.permutation(len(members)).tolist():
            # Counting on from site to site keeps the folds within one plot of equal size.
            fold_of[members[position]] = len(fold_of) % folds
    return [fold_of[group] for group in groups]


def site_folds(sites: Sequence[str]) -> list[int]:
    """A fold for each site, in the order of their names.

    Args:
        sites: of each sample.

    Raises:
        DataError: there is only one site.
    """
    names = sorted(set(sites))
    if len(names) < 2:
        raise DataError(f"all plots are of the site {names[0]!r}; two or more are needed to hold one out")
    return [names.index(site) for site in sites]
