"""What a directory is, strictly read: headers, indexes, links, and files before their data."""
