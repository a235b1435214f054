"""Output for people and programs: tables, progress, numbers, JSON."""
