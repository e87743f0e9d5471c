"""Triton programs, one kernel a file."""
