"""A trained model made smaller from unlabelled images, and its recovery by distillation."""
