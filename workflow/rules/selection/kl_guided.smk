# KL-guided (GA-S2): restore one layer of the all-linear student, train briefly, rank by held-out KL.
rule select_kl_guided:
    input:
        model="<results>/models/{base}/source.json",
        corpus=HELPERS.calibration_corpus,
        aligned=HELPERS.selector_alignment,
    output:
        "<results>/selection/{base}/{selector}/{budget}/placement.json",
    log:
        "<logs>/select/{base}-{selector}-{budget}.log",
    benchmark:
        "<results>/benchmarks/select/{base}-{selector}-{budget}.jsonl"
    wildcard_constraints:
        selector=HELPERS.selectors_of("kl_guided"),
    priority: 20
    threads: 1
    params:
        state=HELPERS.state,
        selector=HELPERS.selector,
        mixer=HELPERS.selector_mixer,
        corpus=subpath(input.corpus, parent=True),
        aligned=subpath(input.aligned, parent=True),
    shell:
        "rad --threads {threads} select --selector {params.selector:q} --model {input.model} "
        "--budget {wildcards.budget} --corpus {params.corpus} --aligned {params.aligned} "
        "--mixer {params.mixer:q} --state {params.state}/select-{wildcards.base}-{wildcards.selector} "
        "--output {output} >> {log} 2>&1"
