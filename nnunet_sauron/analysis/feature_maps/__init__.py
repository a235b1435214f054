"""Shows the feature maps of a layer for a slice of an image."""
