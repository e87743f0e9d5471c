"""Families of experts one by one, under the names of most publishers."""
