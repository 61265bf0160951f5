# The study beside what was published. Both need the scores of all runs, as the report does; before
# that, `rad papers` reads whatever is there.
rule papers_claims:
    input:
        study="<results>/study.json",
        scored=HELPERS.everything_scored,
    output:
        tables=report(
            "<results>/tables/claims.csv", caption="../report/tables.rst", category="Papers"
        ),
        other_tables=multiext("<results>/tables/claims", ".md", ".tex", ".json"),
        figure=report(
            "<results>/figures/claims.svg", caption="../report/figures.rst", category="Papers"
        ),
        other_figure="<results>/figures/claims.pdf",
    log:
        "<logs>/papers-claims.log",
    benchmark:
        "<results>/benchmarks/papers/claims.jsonl"
    threads: 1
    params:
        root=subpath(input.study, parent=True),
    shell:
        "rad papers claims --study {input.study} --root {params.root} > {log} 2>&1"


rule papers_compare:
    input:
        study="<results>/study.json",
        scored=HELPERS.everything_scored,
    output:
        tables=report(
            "<results>/tables/paper_vs_measured.csv",
            caption="../report/tables.rst",
            category="Papers",
        ),
        other_tables=multiext("<results>/tables/paper_vs_measured", ".md", ".tex"),
    log:
        "<logs>/papers-compare.log",
    benchmark:
        "<results>/benchmarks/papers/compare.jsonl"
    threads: 1
    params:
        root=subpath(input.study, parent=True),
    shell:
        "rad papers compare --study {input.study} --root {params.root} > {log} 2>&1"


# What `snakemake papers` makes.
rule papers:
    input:
        rules.papers_claims.output,
        rules.papers_compare.output,
    localrule: True
