"""Kernels on tensors and offsets, for Mixture-of-Experts layers; they have never heard of a model.

`reference` holds the eager twin of each: it imports torch only, and is the specification.
"""
