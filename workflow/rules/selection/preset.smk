# A published list.
use rule select as select_preset with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("preset"),
