"""What an address spells: captures in names, the numbers that letters take, and names that are copies of another."""
