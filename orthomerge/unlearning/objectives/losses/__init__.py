"""The unlearning objectives, one file each; ``registry`` imports every module of this package.

A file holds one pure function with ``@objective``: the loss on the forget set, to be minimised.
Objectives see tensors only: no model, no files, no settings beyond their own arguments. They import
torch inside functions, so that listing them does not pay for it.

Throughout, ``ℓ_t = -log p(y_t | y_<t)`` on the n scored tokens of a row, ``S = Σ_t ℓ_t``, z are the
logits, and "ref" marks the starting model.
"""
