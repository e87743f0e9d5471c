"""What happens to tensors: groups converted, whole plans run, views handed out."""
