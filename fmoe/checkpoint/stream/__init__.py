"""A plan as copies between files: which bytes go where, cut into jobs, and carried out on threads."""
