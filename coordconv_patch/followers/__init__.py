"""Hooks that tell a model's coordinate layers which part of a picture they see, by themselves.

Models that pad batches, cut regions out or letterbox know it at each forward pass, and nobody
else does. A follower is a set of hooks that read it there and enter the places, for this thread
and until the module that they hang on returns, see :func:`coordconv_patch.places`.
"""
