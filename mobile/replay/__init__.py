"""Traces of routing, and their replay under any strategy without the model. No torch."""
