"""What happens around a training step, one short file each."""
