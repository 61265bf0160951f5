# A teacher runs over the corpus once; its students read what was stored and never load it.
# Only the manifest is declared: shards of an interrupted job are kept and completed.
rule teacher_outputs:
    input:
        model="<results>/models/{model}/source.json",
        corpus=f"<results>/corpus/{STUDY.corpus}/manifest.json",
    output:
        "<results>/teachers/{model}/manifest.json",
    log:
        "<logs>/teacher_outputs/{model}.log",
    benchmark:
        "<results>/benchmarks/teacher_outputs/{model}.jsonl"
    wildcard_constraints:
        model=HELPERS.either(STUDY.teacher_outputs),
    priority: 30
    threads: 1
    params:
        options=HELPERS.teacher_outputs_options,
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "rad --threads {threads} teacher-outputs --model {input.model} --corpus {params.corpus} "
        "{params.options} --output {params.folder} >> {log} 2>&1"
