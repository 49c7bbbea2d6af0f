"""Merging of real experts on real tasks: data, training, evaluation and statistics.

``benchmarks/task_merges.py`` is the program; the modules here are its parts.
"""
