"""The server's parts: who may ask, the bodies of requests, and the one queue in which they are answered.

Modules here need FastAPI, pydantic and Transformers; `mobile serve` imports them once it knows that they are there.
"""
