"""The approaches that MoBiLE is compared with, one published approach a file.

`signals` has what some of them predict or rank with.
"""
