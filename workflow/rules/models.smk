rule model:
    output:
        "<results>/models/{model}/source.json",
    params:
        settings=HELPERS.model,
    log:
        "<logs>/model/{model}.log",
    localrule: True
    shell:
        "rad model --name {wildcards.model} --settings {params.settings:q} --output {output} 2> {log}"


NANO = "results/nano_models"


rule nano_models:
    input:
        expand(NANO + "/{size}/model.safetensors", size=["base", "medium", "large"]),


rule pretrain:
    input:
        parents=HELPERS.nano_parents,
    output:
        NANO + "/{size}/model.safetensors",
    params:
        folder=lambda wildcards, output: str(Path(output[0]).parent),
    log:
        "logs/nano_models/{size}.log",
    wildcard_constraints:
        size="base|medium|large",
    threads: 1
    shell:
        "rad --threads {threads} pretrain --size {wildcards.size} --parents {NANO} "
        "--output {params.folder} >> {log} 2>&1"
