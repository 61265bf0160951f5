# GPU jobs on the test's cluster, whose GPUs are device files: what they are given, and torchrun.
# cwd: the folder in which the study ran; config: run
from rad.workflow import use_own_environment

use_own_environment()

RESULTS = "results/nano-smoke"
RUN = f"{RESULTS}/runs/{config['run']}"


rule all:
    input:
        expand("gpus/{job}", job=["first", "second"]),
        "gpus/sharded/training.json",


rule one:
    output:
        "gpus/{job}",
    wildcard_constraints:
        job="first|second",
    resources:
        gpu=1,
    shell:
        # long enough to run beside the other one
        "rad gpu-run --gpus {resources.gpu} -- sh -c 'echo $CUDA_VISIBLE_DEVICES > {output}; sleep 10'"


rule sharded:
    output:
        "gpus/sharded/training.json",
    log:
        "gpus/sharded.log",
    resources:
        gpu=2,
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "rad --threads 1 --gpus {resources.gpu} distil --device cpu --spec {RUN}/spec.json "
        "--placement {RUN}/placement.json --corpus {RESULTS}/corpus/distil "
        "--aligned {RESULTS}/alignment/base/mamba2 --state state/sharded "
        "--output {params.folder} > {log} 2>&1"
