"""What starts a kernel: launches, tiles from a table, batches of vmap."""
