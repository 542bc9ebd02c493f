"""``python -m u2a``: the command ``u2a``, by an interpreter that is named."""

from __future__ import annotations

import sys

from u2a.cli import main

if __name__ == "__main__":
    sys.exit(main())
