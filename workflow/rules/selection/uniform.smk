# Evenly spaced layers or heads: the baseline.
use rule select as select_uniform with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("uniform"),
