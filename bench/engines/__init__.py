"""What `bench/engine.py` is made of: the published loops as their authors run them, the shapes, and the measurements.

The loops and forwards here are written from their descriptions and share no code with the server.
"""
