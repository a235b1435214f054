"""Built-in datasets, for a first run and for tests without a download."""
