# Evenly spaced layers: the baseline.
rule select_uniform:
    input:
        model="<results>/models/{base}/source.json",
    output:
        "<results>/selection/{base}/{selector}/{budget}/placement.json",
    log:
        "<logs>/select/{base}-{selector}-{budget}.log",
    benchmark:
        "<results>/benchmarks/select/{base}-{selector}-{budget}.jsonl"
    wildcard_constraints:
        selector=HELPERS.selectors_of("uniform"),
    threads: 1
    params:
        selector=HELPERS.selector,
    shell:
        "rad select --selector {params.selector:q} --model {input.model} "
        "--budget {wildcards.budget} --output {output} > {log} 2>&1"
