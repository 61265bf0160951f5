"""The registry of task kinds: where documents come from and how responses are scored."""

from __future__ import annotations

from rad.evaluation.documents import (
    choice,
    crux,
    cruxeval,
    gsm8k,
    nano,
    recall,
    ruler_text,
    text,
    zeroeval,
)
from rad.evaluation.request import Kind
from rad.evaluation.ruler import build as ruler_build
from rad.evaluation.scoring import choices, contains, literals, numbers, perplexity
from rad.evaluation.scoring import cruxeval as cruxeval_scoring
from rad.evaluation.scoring import ruler as ruler_scoring
from rad.evaluation.scoring import zeroeval as zeroeval_scoring

_NUMBERS = ("exact_match", "flexible_match", "semantic_match", "no_answer")
_LITERALS = ("literal_match", "exact_match")
_STRINGS = ("string_match", "exact_match")
_CODE = ("pass@1", "pass@5", "exact_match", "semantic_match", "no_answer")
_JSON = ("exact_match", "semantic_match", "no_answer", "upstream_match")

KINDS: dict[str, Kind] = {
    "gsm_nano": Kind("gsm", _NUMBERS, nano.build, numbers.gsm_results),
    "crux_nano": Kind("crux", _LITERALS, nano.build, literals.crux_results),
    "ruler_nano": Kind(
        "ruler", ("exact_match", "string_match"), nano.build_ruler, contains.ruler_results
    ),
    "ruler_text": Kind("ruler", _STRINGS, ruler_text.build, contains.ruler_results),
    "ruler": Kind("ruler", ("string_match",), ruler_build.build, ruler_scoring.ruler_results),
    "gsm8k": Kind("gsm8k", _NUMBERS, gsm8k.build, numbers.gsm_results),
    "gsm8k_cot": Kind("gsm8k", _NUMBERS, gsm8k.build, numbers.gsm_cot_results),
    "gsm8k_cot_llama": Kind("gsm8k", _NUMBERS, gsm8k.build, numbers.gsm_cot_llama_results),
    "crux": Kind("crux", _LITERALS, crux.build, literals.crux_results),
    "gsm_zeroeval": Kind("gsm", _JSON, zeroeval.build, zeroeval_scoring.gsm_zeroeval_results),
    "crux_zeroeval": Kind("crux", _JSON, zeroeval.build, zeroeval_scoring.crux_zeroeval_results),
    **{
        name: Kind("retrieval", ("contains", "exact_match"), recall.build, contains.recall_results)
        for name in ("swde", "fda", "squad_completion", "record_recall", "qa_recall")
    },
    # `contains` would count 7 within 17
    "kv_retrieval": Kind(
        "retrieval", ("exact_match", "contains"), recall.build, contains.recall_results
    ),
    # acc_norm is the headline where RAD's Table 1 and its peers report it
    **{
        name: Kind("general", ("acc_norm", "acc"), choice.build, choices.choice_results)
        for name in ("arc_challenge", "hellaswag", "piqa", "openbookqa")
    },
    **{
        name: Kind("general", ("acc",), choice.build, choices.choice_results)
        for name in ("arc_easy", "winogrande", "mmlu", "pubmedqa", "race", "truthfulqa_mc1")
    },
    "truthfulqa_mc2": Kind("general", ("acc",), choice.build, choices.mass_results),
    "lambada": Kind("general", ("acc", "perplexity"), choice.build, choices.lambada_results),
    "cruxeval_output": Kind(
        "cruxeval", _CODE, cruxeval.build, cruxeval_scoring.cruxeval_output_results
    ),
    "cruxeval_input": Kind(
        "cruxeval", _CODE, cruxeval.build, cruxeval_scoring.cruxeval_input_results
    ),
    "perplexity": Kind(
        "perplexity",
        ("token_nll", "perplexity", "word_perplexity", "byte_perplexity"),
        text.build,
        perplexity.perplexity_results,
        higher_is_better=False,
    ),
}
