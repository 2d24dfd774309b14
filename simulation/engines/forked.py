"""What workers that really train have in common: imported once, in the process that they are forked from.

Named to `multiprocessing`'s forkserver, which imports it and has no thread that could hold a lock at a fork. Torch and
transformers take more memory than many an adapter's training; forked, all workers share it.
"""

from __future__ import annotations

import gc

import simulation.real  # noqa: F401  with all that it needs
from edge_runtime.train import base

base.warm()
# A collection in a worker would write into every page that holds an object.
gc.collect()
gc.freeze()
