"""What is seen of a checkpoint without converting it: how large its parts are, and what its numbers are like."""
