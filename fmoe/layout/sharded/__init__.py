"""What follows axes over ranks: placements of DTensors, shards converted where they are, plans on a mesh."""
