# Perplexity with a layer ablated.
use rule select as select_lm_ppl with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("lm_ppl"),
