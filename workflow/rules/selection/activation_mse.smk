# Layers whose mixer stays furthest from their attention.
use rule select as select_activation_mse with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("activation_mse"),
