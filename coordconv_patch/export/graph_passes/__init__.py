"""Rewrites of the exported graph: one onnx-ir pass a file, which is named for its effect.

``modified`` of a pass's result is true only if the graph has changed. A pass that leaves a place
alone for which it is meant says why, see :mod:`.refusals`; what several passes ask of a graph is
in :mod:`.vocabulary`. Their order is in :mod:`coordconv_patch.export.rewrites`.
"""
