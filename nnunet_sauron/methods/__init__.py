"""Pruning methods, and what they share: targets, limits, measuring, distillation."""
