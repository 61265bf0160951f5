# What the selectors of the package share; each is one file in selection/ that inherits this rule.
rule select:
    input:
        model="<results>/models/{base}/source.json",
        corpus=HELPERS.selector_corpus,
        aligned=HELPERS.selector_alignment,
    output:
        "<results>/selection/{base}/{selector}/{budget}/placement.json",
    log:
        "<logs>/select/{base}-{selector}-{budget}.log",
    benchmark:
        "<results>/benchmarks/select/{base}-{selector}-{budget}.jsonl"
    wildcard_constraints:
        selector=HELPERS.either([]),  # matches nothing
    priority: 20
    threads: 1
    resources:
        gpu=0,
    params:
        method=HELPERS.selector_method,
        settings=HELPERS.selector,
        options=HELPERS.selector_options,
    shell:
        "exec rad --threads {threads} --gpus {resources.gpu} select {params.method} "
        "--settings {params.settings:q} "
        "--model {input.model} --budget {wildcards.budget} {params.options} --out {output} >> {log} 2>&1"
