# Error of the last hidden state with a layer ablated.
use rule select as select_activation_mse with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("activation_mse"),
