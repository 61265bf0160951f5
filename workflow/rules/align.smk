rule align:
    input:
        model="<results>/models/{base}/source.json",
        corpus=HELPERS.alignment_corpus,
    output:
        "<results>/alignment/{base}/{mixer}/mixers.safetensors",
        "<results>/alignment/{base}/{mixer}/alignment.json",
    log:
        "<logs>/align/{base}-{mixer}.log",
    benchmark:
        "<results>/benchmarks/align/{base}-{mixer}.jsonl"
    priority: 20
    threads: 1
    resources:
        gpu=0,
    params:
        state=HELPERS.state,
        mixer=HELPERS.mixer,
        settings=HELPERS.alignment,
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "exec rad --threads {threads} --gpus {resources.gpu} align --model {input.model} "
        "--mixer {params.mixer:q} "
        "--settings {params.settings:q} --corpus {params.corpus} "
        "--state {params.state}/align-{wildcards.base}-{wildcards.mixer} "
        "--output {params.folder} >> {log} 2>&1"
