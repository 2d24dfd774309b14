"""`python -m edge_runtime.cli VERB`: the same as `edge-runtime VERB`, for an interpreter that is not on PATH."""

from edge_runtime.cli import main

main()
