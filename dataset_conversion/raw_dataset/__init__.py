"""What all conversions share: `cases` describes a data set, `checks` validates it, `writing` writes it.

A conversion calls `command.main` and finds its way in a download with `tree`.
"""
