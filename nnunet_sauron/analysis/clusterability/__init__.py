"""Tells whether feature maps clustered while models trained."""
