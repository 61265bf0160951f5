# KL-guided: restore one layer of the all-linear student, train briefly, rank by held-out KL.
use rule select as select_kl_guided with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("kl_guided"),
