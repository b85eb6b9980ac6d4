"""`dinov3geo track`: objects followed through frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3geo.commands.console import check_folder, format_seconds, print_pairs, print_table, progress_bar
from dinov3geo.commands.options import Backbone, Changes, Device, Overwrite
from dinov3geo.errors import ConfigError

if TYPE_CHECKING:
    from dinov3geo.evaluation.follow import Followed


def track(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="VIDEO_FOLDER", help="Frames in the order of their names.", show_default=False
        ),
    ],
    first_mask: Annotated[
        Path,
        typer.Option(metavar="PNG|TIF", help="Objects in the first frame, 0 elsewhere.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the masks.", show_default=False)
    ],
    backbone: Backbone = None,
    start: Annotated[
        str | None, typer.Option(metavar="NAME", help="Frame of the mask.", show_default="the first")
    ] = None,
    short_side: Annotated[
        int, typer.Option(min=16, help="Frames are resized to it before the backbone sees them.")
    ] = 480,
    truth: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="True masks of some frames, to score J and F.", show_default=False),
    ] = None,
    there_and_back: Annotated[
        bool,
        typer.Option(
            help="Also follow the last mask back to the first frame, and score it against the first mask."
        ),
    ] = False,
    pixels: Annotated[
        bool,
        typer.Option("--pixels", help="Compare raw pixels instead of features."),
    ] = False,
    video: Annotated[
        str, typer.Option(metavar="gif|png|webp|none", help="Form of the overlay; png is animated.")
    ] = "gif",
    fps: Annotated[float, typer.Option(min=0.1, help="Frames per second of the overlay.")] = 6.0,
    changes: Changes = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Follow objects through a video, or through dates of one place, from the mask of one frame.

    Dates of one place (GeoTIFFs) are read on the grid of the first one, and masks are GeoTIFFs too.
    """
    from dinov3geo.backbones.device import resolve_device
    from dinov3geo.backbones.inference import for_inference
    from dinov3geo.backbones.zoo import DEFAULT_BACKBONE, load_backbone
    from dinov3geo.config import load_model
    from dinov3geo.evaluation.follow import follow
    from dinov3geo.evaluation.frames import VIDEO_SUFFIXES, Frames, patch_encoder, pixel_encoder
    from dinov3geo.evaluation.tracking import TrackSettings

    if video != "none" and f".{video}" not in VIDEO_SUFFIXES:
        raise ConfigError(f"unknown form of video {video!r}; valid names: gif, png, webp, none")
    settings = load_model(TrackSettings, None, changes or [])
    check_folder(output)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output} is not empty; choose another folder or give --overwrite")
    network = load_backbone(backbone or DEFAULT_BACKBONE)
    assert network.card is not None
    frames = Frames(folder, bands=network.card.normalization.bands, model=network.card.name, start=start)
    encode = (
        pixel_encoder(patch=network.patch_size, short_side=short_side)
        if pixels
        else patch_encoder(for_inference(network.to(resolve_device(device))), short_side=short_side)
    )
    with progress_bar(folder.name) as tell:
        result = follow(
            frames,
            first_mask,
            encode,
            output,
            settings=settings,
            truth=truth,
            there_and_back=there_and_back,
            video=None if video == "none" else output / f"overlay.{video}",
            frames_per_second=fps,
            progress=tell,
        )
    _print(result)


def _print(result: Followed) -> None:
    pairs = [
        ("masks", f"{len(result.masks)} in {result.folder}"),
        ("objects", str(len(result.objects))),
        ("time", format_seconds(result.seconds)),
    ]
    if result.video is not None:
        pairs.insert(1, ("overlay", str(result.video)))
    print_pairs(pairs)
    if result.scores:
        rows = [
            [s.name, str(s.object), f"{s.j:.3f}", f"{s.f:.3f}", f"{(s.j + s.f) / 2:.3f}"]
            for s in result.scores
        ]
        print_table(["frame", "object", "J", "F", "J&F"], rows)
