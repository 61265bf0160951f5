# Associative recall with a layer ablated.
use rule select as select_ar with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("ar"),
