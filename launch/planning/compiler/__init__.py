"""What the TPU's own compiler says."""
