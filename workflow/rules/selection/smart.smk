# SMART: most sensitive layers, with the endpoints kept and no long gaps.
use rule select as select_smart with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("smart"),
