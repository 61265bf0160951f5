# Every task and length is a file of its own: another length, task or seed leaves the rest alone.
rule ruler:
    input:
        model=HELPERS.tokenizer_model,
        files=HELPERS.ruler_files,
    output:
        "<results>/ruler/{ruler}/{subtask}/{length}.jsonl",
        "<results>/ruler/{ruler}/{subtask}/{length}.json",
    log:
        "<logs>/ruler/{ruler}-{subtask}-{length}.log",
    benchmark:
        "<results>/benchmarks/ruler/{ruler}-{subtask}-{length}.jsonl"
    wildcard_constraints:
        ruler=HELPERS.either(HELPERS.ruler_tasks),
        subtask="[a-z0-9_]+",
        length="[0-9]+",
    priority: 20
    threads: 1
    params:
        options=HELPERS.ruler_options,
        folder=subpath(output[0], ancestor=2),
    shell:
        "rad --threads {threads} ruler --model {input.model} --task {wildcards.subtask} "
        "--length {wildcards.length} {params.options} --output {params.folder} > {log} 2>&1"
