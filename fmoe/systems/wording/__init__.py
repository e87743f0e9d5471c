"""What tables of systems are written in: a config's facts, names in pairs, stages of values, the published layout."""
