"""A layout is a value: rules of names and axes, what they claim, the plan they make, and the adapter that runs it."""
