# Multi-hop associative recall with a layer ablated.
use rule select as select_ar_mh with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("ar_mh"),
