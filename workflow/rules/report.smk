rule study:
    output:
        "<results>/study.json",
    log:
        "<logs>/study.log",
    localrule: True
    params:
        study=HELPERS.whole_study,
    shell:
        "printf '%s\\n' {params.study:q} > {output} 2> {log}"


rule report:
    input:
        study="<results>/study.json",
        scored=HELPERS.everything_scored,
    output:
        page="<results>/report.html",
        tables=report(
            HELPERS.report_files("tables", ".csv"),
            caption="../report/tables.rst",
            category="Tables",
        ),
        other_tables=HELPERS.report_files("tables", ".md", ".tex"),
        figures=report(
            HELPERS.report_files("figures", ".svg"),
            caption="../report/figures.rst",
            category="Figures",
        ),
        other_figures=HELPERS.report_files("figures", ".pdf"),
    log:
        "<logs>/report.log",
    benchmark:
        "<results>/benchmarks/report/report.jsonl"
    threads: 1
    params:
        root=subpath(input.study, parent=True),
    shell:
        "rad report --study {input.study} --root {params.root} > {log} 2>&1"
