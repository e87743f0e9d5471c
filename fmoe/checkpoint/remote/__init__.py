"""Checkpoints by address: the hub's, a bucket's, a web server's, read by ranges; and ranks that share a conversion."""
