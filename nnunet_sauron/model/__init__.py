"""A trained model: its folder, checkpoints and networks, the cases it reads and the segmentations it gives."""
