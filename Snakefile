from snakemake.utils import min_version

min_version("9.20")


if "name" not in config:

    # beside this file, also when results go elsewhere (--directory)
    configfile: workflow.source_path("config/nano.yaml")


include: "workflow/rules/common.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/ruler.smk"
include: "workflow/rules/align.smk"
include: "workflow/rules/select.smk"


for selector_rules in SELECTION_RULES:

    include: selector_rules


include: "workflow/rules/teacher.smk"
include: "workflow/rules/convert.smk"
include: "workflow/rules/distil.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/papers.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        "<results>/report.html",
