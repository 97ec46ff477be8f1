"""What `benchmarks/bench.py` measures: the contestants, and the arena in which they take turns."""
