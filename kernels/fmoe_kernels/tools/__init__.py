"""Tools for whoever works on the kernels: measuring tiles."""
