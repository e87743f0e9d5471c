"""Kernels as operators of PyTorch: raw products, custom operators, the differentiable layer."""
