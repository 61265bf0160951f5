# RAD: skip what self-speculative decoding does not miss.
use rule select as select_rad with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("rad"),
