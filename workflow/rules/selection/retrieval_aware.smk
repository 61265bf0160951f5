# Retrieval-aware: keep the heads whose ablation hurts retrieval most.
rule select_retrieval_aware:
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
        selector=HELPERS.selectors_of("retrieval_aware"),
    priority: 10
    threads: 1
    params:
        selector=HELPERS.selector,
        corpus=subpath(input.corpus, parent=True),
    shell:
        "rad --threads {threads} select --selector {params.selector:q} --model {input.model} "
        "--budget {wildcards.budget} --corpus {params.corpus} --output {output} > {log} 2>&1"
