# Retrieval-aware: keep the heads whose ablation hurts retrieval most.
use rule select as select_retrieval_aware with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("retrieval_aware"),
