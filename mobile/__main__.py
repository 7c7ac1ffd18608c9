"""`python -m mobile` is the command `mobile`."""

from __future__ import annotations

import sys

from mobile.cli import main

if __name__ == "__main__":
    sys.exit(main())
