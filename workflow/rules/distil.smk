rule distil:
    input:
        spec="<results>/runs/{run}/spec.json",
        placement=HELPERS.placement,
        corpus=HELPERS.training_corpus,
        tasks="<results>/tasks/manifest.json",
        models=HELPERS.run_models,
        aligned=HELPERS.run_alignment,
        teacher=HELPERS.run_teacher,
    output:
        "<results>/runs/{run}/model/model.safetensors",
        "<results>/runs/{run}/model/config.json",
        "<results>/runs/{run}/curve.jsonl",
        "<results>/runs/{run}/training.json",
        "<results>/runs/{run}/placement.json",
    log:
        "<logs>/distil/{run}.log",
    benchmark:
        "<results>/benchmarks/distil/{run}.jsonl"
    priority: 5  # before evaluations, which then fill the idle core at the end
    threads: 1
    resources:
        gpu=0,
    params:
        state=HELPERS.state,
        corpus=subpath(input.corpus, parent=True),
        tasks=subpath(input.tasks, parent=True),
        aligned=HELPERS.aligned_option,
        teacher=HELPERS.teacher_options,
        probe_samples=STUDY.evaluation.probe_samples,
        folder=subpath(input.spec, parent=True),
    shell:
        "exec rad --threads {threads} --gpus {resources.gpu} distil --spec {input.spec} "
        "--placement {input.placement} "
        "--corpus {params.corpus} --tasks {params.tasks} --probe-samples {params.probe_samples} "
        "{params.aligned} {params.teacher} --state {params.state}/{wildcards.run} --output {params.folder} >> {log} 2>&1"
