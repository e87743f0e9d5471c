"""Containers that are no safetensors files, strictly read and written: torch DCP directories, their pickles."""
