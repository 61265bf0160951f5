# One job per model scores all tasks: loading the libraries costs more than most tasks.
rule evaluate:
    input:
        spec="<results>/runs/{scored}/spec.json",
        model=HELPERS.scored_model,
        tasks="<results>/tasks/manifest.json",
    output:
        "<results>/runs/{scored}/evaluation.json",
        "<results>/runs/{scored}/samples.jsonl",
        "<results>/runs/{scored}/efficiency.json",
    log:
        "<logs>/evaluate/{scored}.log",
    benchmark:
        "<results>/benchmarks/evaluate/{scored}.jsonl"
    threads: 1
    resources:
        gpu=0,
    params:
        settings=HELPERS.tasks,
        tasks=subpath(input.tasks, parent=True),
        folder=subpath(input.spec, parent=True),
    shell:
        "rad --threads {threads} --gpus {resources.gpu} evaluate --spec {input.spec} "
        "--tasks {params.tasks} "
        "--settings {params.settings:q} --output {params.folder} > {log} 2>&1"
