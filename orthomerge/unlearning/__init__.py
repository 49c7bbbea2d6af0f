"""Unlearning: make a model forget given rows while it keeps the rest."""
