"""Pure maths of the mixers: plain recurrences (the reference, kept) and chunked forms."""

from rad.kernels.conv import causal_conv, causal_conv_reference
from rad.kernels.ssd import ssd_chunked, ssd_recurrent

__all__ = ["causal_conv", "causal_conv_reference", "ssd_chunked", "ssd_recurrent"]
