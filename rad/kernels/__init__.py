"""Pure maths of the mixers: plain recurrences (the reference, kept), chunked and one-step forms.

Mixers call the four functions of `dispatch`, which choose by device; the forms themselves are in
`ssd`, `delta`, `gla` and `scan`.
"""

from rad.kernels.conv import causal_conv, causal_conv_reference
from rad.kernels.dispatch import gated_delta, gla, selective_scan, ssd, use_reference

__all__ = [
    "causal_conv",
    "causal_conv_reference",
    "gated_delta",
    "gla",
    "selective_scan",
    "ssd",
    "use_reference",
]
