"""One file, one question; its answer is a number. `python -m benchmarks.<question>` ends in a RESULT line."""
