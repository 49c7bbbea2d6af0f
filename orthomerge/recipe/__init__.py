"""Recipes: the YAML grammar, its loader with positions, and the doors ``merge`` and ``plan``.

Import from the modules: ``loader`` for files, ``schema`` for the grammar, ``run`` for the doors.
"""
