"""`nnUNetv2_sauron demo`: Sauron, Shrink and a compressed model beside stock nnU-Net, by nnU-Net's own commands."""
