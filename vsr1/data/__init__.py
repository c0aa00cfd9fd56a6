"""What the loop learns from: annotated moments, and a rendered world of small videos whose truth is known.

Nothing is imported here: the processes that render the world load numpy and PyAV only.
"""
