"""`nnUNetv2_sauron demo`: SauronTrainer beside stock nnU-Net on a generated dataset, by nnU-Net's own commands."""
