"""Arithmetic before anything runs: who sits where, what fits, and how long a step takes."""
