# RAD: skip what self-speculative decoding does not miss.
rule select_rad:
    input:
        model="<results>/models/{base}/source.json",
        corpus=HELPERS.calibration_corpus,
    output:
        "<results>/selection/{base}/{selector}/{budget}/placement.json",
    log:
        "<logs>/select/{base}-{selector}-{budget}.log",
    benchmark:
        "<results>/benchmarks/select/{base}-{selector}-{budget}.jsonl"
    wildcard_constraints:
        selector=HELPERS.selectors_of("rad"),
    priority: 10
    threads: 1
    params:
        selector=HELPERS.selector,
        corpus=subpath(input.corpus, parent=True),
    shell:
        "rad --threads {threads} select --selector {params.selector:q} --model {input.model} "
        "--budget {wildcards.budget} --corpus {params.corpus} --output {output} > {log} 2>&1"
