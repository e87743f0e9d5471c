"""Families of experts fused or stacked: all of a layer in one tensor."""
