"""What only tools write: words in an order of their own, zero points, and formats that are not read."""
