"""Public data sets, from their download to nnU-Net's raw format: one file each, and `raw_dataset`, which they share."""
