"""The parts that a page is made of, and how numbers are written in them."""
