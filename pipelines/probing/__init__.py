"""`whence probe`: influences of sequences that the user wrote, which the corpus need not have, on queries of their own.

`run` is the job; `measures` are pure functions of scores; `table`, `page` and `figures` write what it leaves.
"""

from __future__ import annotations

from pipelines.probing.run import ProbeResult, run_probe

__all__ = ["ProbeResult", "run_probe"]
