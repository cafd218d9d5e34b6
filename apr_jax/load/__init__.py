"""From a checkpoint to parameters on a device, and back."""
