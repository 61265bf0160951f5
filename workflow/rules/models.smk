rule model:
    output:
        "<results>/models/{model}/source.json",
    log:
        "<logs>/model/{model}.log",
    # before anything else: a model that is gated, missing or of another revision says so at once
    priority: 100
    localrule: True
    params:
        settings=HELPERS.model,
    shell:
        "rad model --name {wildcards.model} --settings {params.settings:q} --output {output} 2> {log}"


rule nano_models:
    input:
        expand("results/nano_models/{size}/model.safetensors", size=["base", "medium", "large"]),


rule pretrain:
    output:
        "results/nano_models/{size}/model.safetensors",
    log:
        "logs/nano_models/{size}.log",
    wildcard_constraints:
        size="base|medium|large",
    threads: 1
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "exec rad --threads {threads} pretrain --size {wildcards.size} "
        "--output {params.folder} >> {log} 2>&1"
