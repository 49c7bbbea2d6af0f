"""The merge methods, one file each; ``registry`` imports every module of this package.

A file holds one pure function with ``@merge_method`` and, where needed, its survey. Methods see
tensors only: no files, no logging, no settings beyond their own arguments. They import torch inside
functions, so that listing and planning methods does not pay for it.
"""
