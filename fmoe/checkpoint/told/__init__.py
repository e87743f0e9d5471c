"""What a written directory tells of its codes: config.json to its readers, and notes of those that fail at it."""
