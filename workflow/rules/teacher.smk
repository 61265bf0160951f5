# A teacher runs over the corpus once; its students read what was stored and never load it.
# Shards and their records are not declared: those of an interrupted job are kept and completed.


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
        model=HELPERS.either(HELPERS.teachers_at_once),
    priority: 30
    threads: 1
    resources:
        gpu=0,
    params:
        options=HELPERS.teacher_outputs_options,
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "exec rad --threads {threads} --gpus {resources.gpu} teacher-outputs --model {input.model} "
        "--corpus {params.corpus} "
        "{params.options} --output {params.folder} >> {log} 2>&1"


# The same in steps: what is stored, then the parts side by side, then one manifest of all shards.
# The start record is what students with `stream` wait for; parts go before them (priority), so
# that a student never holds the core that its teacher needs.
rule teacher_start:
    input:
        model="<results>/models/{model}/source.json",
        corpus=f"<results>/corpus/{STUDY.corpus}/manifest.json",
    output:
        "<results>/teachers/{model}/start.json",
    log:
        "<logs>/teacher_start/{model}.log",
    wildcard_constraints:
        model=HELPERS.either(HELPERS.teachers_in_steps),
    priority: 40
    threads: 1
    resources:
        gpu=0,
    params:
        options=HELPERS.teacher_outputs_options,
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "exec rad --threads {threads} --gpus {resources.gpu} teacher-outputs --step start "
        "--model {input.model} "
        "--corpus {params.corpus} {params.options} --output {params.folder} >> {log} 2>&1"


rule teacher_part:
    input:
        model="<results>/models/{model}/source.json",
        corpus=f"<results>/corpus/{STUDY.corpus}/manifest.json",
        start="<results>/teachers/{model}/start.json",
    output:
        "<results>/teachers/{model}/part-{part}-of-{parts}.json",
    log:
        "<logs>/teacher_part/{model}-{part}-of-{parts}.log",
    benchmark:
        "<results>/benchmarks/teacher_part/{model}-{part}-of-{parts}.jsonl"
    wildcard_constraints:
        model=HELPERS.either(HELPERS.teachers_in_steps),
        part=r"\d{5}",
        parts=r"\d{5}",
    priority: 30
    threads: 1
    resources:
        gpu=0,
    params:
        options=HELPERS.teacher_outputs_options,
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "exec rad --threads {threads} --gpus {resources.gpu} teacher-outputs --step part "
        "--part {wildcards.part} "
        "--parts {wildcards.parts} --model {input.model} --corpus {params.corpus} "
        "{params.options} --output {params.folder} >> {log} 2>&1"


rule teacher_merge:
    input:
        model="<results>/models/{model}/source.json",
        corpus=f"<results>/corpus/{STUDY.corpus}/manifest.json",
        start="<results>/teachers/{model}/start.json",
        parts=HELPERS.teacher_parts,
    output:
        "<results>/teachers/{model}/manifest.json",
    log:
        "<logs>/teacher_merge/{model}.log",
    wildcard_constraints:
        model=HELPERS.either(HELPERS.teachers_in_steps),
    priority: 30
    localrule: True
    params:
        corpus=subpath(input.corpus, parent=True),
        folder=subpath(output[0], parent=True),
    shell:
        "exec rad teacher-outputs --step merge --model {input.model} --corpus {params.corpus} "
        "--output {params.folder} >> {log} 2>&1"
