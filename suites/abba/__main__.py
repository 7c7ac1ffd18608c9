"""`python -m suites.abba`: time two commits or two strategies in turn."""

from __future__ import annotations

import sys

from suites.abba.commands import main

if __name__ == "__main__":
    sys.exit(main())
