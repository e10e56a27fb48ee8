"""`python -m pipelines VERB [overrides]`, the same as `whence VERB [overrides]`."""

from __future__ import annotations

import sys

from pipelines.command import main

if __name__ == "__main__":
    sys.exit(main())
