"""From a request to a checked plan, from headers only: ``planner`` is the way in.

``dense`` drafts the tasks for full checkpoints, ``oft`` those for OFT adapters; nothing here reads
tensor data.
"""
