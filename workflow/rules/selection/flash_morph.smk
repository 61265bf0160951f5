# FlashMorph: a gate per layer, learnt on retrieval.
use rule select as select_flash_morph with:
    wildcard_constraints:
        selector=HELPERS.selectors_of("flash_morph"),
