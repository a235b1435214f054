"""Public data sets, from their download to nnU-Net's raw format: one file a data set, what is common in `raw_dataset`."""
