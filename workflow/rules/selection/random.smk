# Layers or heads drawn at random: what any method has to beat.
use rule select as select_random with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("random"),
