rule corpus:
    input:
        model=HELPERS.tokenizer_model,
        files=HELPERS.corpus_files,
    output:
        "<results>/corpus/{corpus}/manifest.json",
    log:
        "<logs>/corpus/{corpus}.log",
    benchmark:
        "<results>/benchmarks/corpus/{corpus}.jsonl"
    priority: 20
    threads: 1
    params:
        settings=HELPERS.corpus,
        folder=subpath(output[0], parent=True),
    shell:
        "rad --threads {threads} corpus --name {wildcards.corpus} --settings {params.settings:q} "
        "--model {input.model} --output {params.folder} > {log} 2>&1"


rule tasks:
    input:
        model=HELPERS.tokenizer_model,
        files=HELPERS.task_files,
        ruler=HELPERS.ruler_documents,
    output:
        "<results>/tasks/manifest.json",
    log:
        "<logs>/tasks.log",
    benchmark:
        "<results>/benchmarks/tasks/tasks.jsonl"
    priority: 20
    threads: 1
    params:
        settings=HELPERS.tasks,
        folder=subpath(output[0], parent=True),
        ruler=HELPERS.ruler_folder,
    shell:
        "rad --threads {threads} tasks --settings {params.settings:q} --model {input.model} "
        "--ruler {params.ruler} --output {params.folder} > {log} 2>&1"
