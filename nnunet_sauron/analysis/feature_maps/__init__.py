"""Shows the feature maps of a layer for a slice of an image."""

from .maps import FeatureMaps, default_layer, feature_maps, layer_names

__all__ = ["FeatureMaps", "default_layer", "feature_maps", "layer_names"]
