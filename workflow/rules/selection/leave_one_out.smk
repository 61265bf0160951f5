# Apriel-H1: layers whose conversion hurts most, at once or one after another.
use rule select as select_leave_one_out with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("leave_one_out"),
