# Common-words extraction with a layer ablated.
use rule select as select_cwe with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("cwe"),
