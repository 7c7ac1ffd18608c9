"""The page, once as content, and written in every format."""
