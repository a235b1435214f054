"""What is shown in a terminal, or printed for programs: tables, progress, numbers, JSON."""
