"""Tells whether feature maps clustered while models trained."""

from .measure import Clusterability, clusterability

__all__ = ["Clusterability", "clusterability"]
