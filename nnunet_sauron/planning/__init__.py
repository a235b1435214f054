"""Lean plans for nnU-Net: flat, scaled, of given widths, or those of a pruned checkpoint; planners of flat U-Nets."""
