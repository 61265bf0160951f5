# Variable tracing with a layer ablated.
use rule select as select_vt with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("vt"),
