"""Merging of LoRA adapters as low-rank factors: modules side by side, stages, coordinates, ranks.

The methods are in ``methods``; reading and writing is ``executors``' part.
"""
