"""What makes a plan a proof: the way back of every name, sizes that can be split again, rules that come together."""
