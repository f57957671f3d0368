"""A dataset becomes batches, batches become steps, steps become checkpoints."""
