"""A trained model made smaller without training."""
