"""Models: loading bases, the hybrid model and its cache, conversion.

Import from the modules (`rad.models.hybrid`, `.convert`, `.sources`); this file stays empty so that
describing a model needs no torch.
"""
