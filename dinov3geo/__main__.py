"""`python -m dinov3geo` is the command `dinov3geo`."""

import sys

from dinov3geo.cli import main

if __name__ == "__main__":
    sys.exit(main())
