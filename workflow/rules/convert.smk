# The specification of every run is a file of its own, so that changing one run reruns that one.
# Conversion itself happens in the distillation job: a converted but untrained model is never needed
# alone, and loading the libraries costs more than converting a small model.
rule spec:
    output:
        "<results>/runs/{run}/spec.json",
    log:
        "<logs>/spec/{run}.log",
    localrule: True
    params:
        spec=HELPERS.spec,
    shell:
        "printf '%s\\n' {params.spec:q} > {output} 2> {log}"


rule reference_spec:
    output:
        "<results>/runs/model-{model}/spec.json",
    log:
        "<logs>/spec/model-{model}.log",
    localrule: True
    params:
        spec=HELPERS.reference_spec,
    shell:
        "printf '%s\\n' {params.spec:q} > {output} 2> {log}"
