"""A trained model as a bundle: data that a CPU runs without PyTorch and without nnU-Net."""
