"""Where to compute."""

from __future__ import annotations

import torch

from dinov3geo.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of a name; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here; use auto or cpu") from error
    return device
