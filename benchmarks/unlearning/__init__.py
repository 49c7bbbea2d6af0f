"""A small unlearning benchmark: made-up facts, a model that knows them and one that never did.

``benchmarks/retain_drift.py`` is the program; the modules here are its parts.
"""
