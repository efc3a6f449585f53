"""Loading images, and changing them for training."""
