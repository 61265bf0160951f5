# HALO: layers that recall needs more than language modelling.
use rule select as select_halo with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("halo"),
