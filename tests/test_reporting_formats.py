"""CSV, Markdown, LaTeX and number formats against what they should look like."""

from __future__ import annotations

from rad.reporting.writers import (
    Column,
    Entry,
    Panel,
    Table,
    count,
    csv_text,
    duration,
    latex_escape,
    latex_text,
    markdown_text,
    operations,
    signed,
    significant,
    size,
)

TABLE = Table(
    "example",
    "An_example",
    "50 % & more",
    (
        Panel(
            "a block",
            (Column("name", numeric=False), Column("x ↑", group="g_1"), Column("y", group="g_1")),
            (
                (Entry("kl_guided|x"), Entry("1.0", "[0.5, 1.5]", best=True), Entry("–")),
                (
                    Entry("b"),
                    Entry("0.9", "[0.4, 1.4]", "\u22120.1", "[\u22120.2, 0.0]"),
                    Entry("3"),
                ),
            ),
        ),
    ),
    ("name", "x"),
    [{"name": "kl_guided|x", "x": 1 / 3}, {"name": "b, c", "x": None}],
)


def test_csv_is_golden() -> None:
    assert csv_text(TABLE.fields, TABLE.records) == 'name,x\nkl_guided|x,0.33333333\n"b, c",\n'


def test_markdown_is_golden() -> None:
    assert markdown_text(TABLE) == (
        "## An\\_example\n\n50 % & more\n\n### a block\n\n"
        "| name | g\\_1: x ↑ | g\\_1: y |\n"
        "| :--- | ---: | ---: |\n"
        "| kl\\_guided\\|x | **1.0** [0.5, 1.5] | – |\n"
        "| b | 0.9 [0.4, 1.4]<br>Δ \u22120.1 [\u22120.2, 0.0] | 3 |\n"
    )


def test_latex_is_golden() -> None:
    lines = latex_text(TABLE).splitlines()
    assert lines[3:] == [
        "% a block",
        "\\begin{tabular}{lrr}",
        "\\toprule",
        "\\multicolumn{1}{c}{} & \\multicolumn{2}{c}{g\\_1} \\\\",
        "\\cmidrule(lr){2-3}",
        "name & x $\\uparrow$ & y \\\\",
        "\\midrule",
        "kl\\_guided|x & \\textbf{1.0} {\\scriptsize {[0.5, 1.5]}} & -- \\\\",
        "b & \\shortstack[r]{0.9 {\\scriptsize {[0.4, 1.4]}} \\\\ "
        "{\\scriptsize $\\Delta$ $-$0.1 [$-$0.2, 0.0]}} & 3 \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]


def test_number_formats() -> None:
    assert [signed(text) for text in ("1.0", "-1.0", "-0.0", "0.00")] == [
        "+1.0",
        "\u22121.0",
        "0.0",
        "0.00",
    ]
    assert [significant(value) for value in (1234.5, 12.345, 0.01234, 0.0, None)] == [
        "1,234",
        "12.3",
        "0.0123",
        "0",
        "–",
    ]
    assert [count(value) for value in (12, 4096, 2.5e6, None)] == ["12", "4.1k", "2.5M", "–"]
    assert [operations(value) for value in (0, 1.77e12, 5e6, None)] == ["0", "1.77 T", "5 M", "–"]
    assert [size(value) for value in (512, 1536, 3 * 2**20)] == ["512 B", "1.5 KiB", "3 MiB"]
    assert [duration(value) for value in (1.24, 185, 7620)] == ["1.2 s", "3 min 05 s", "2 h 07 min"]


def test_titles_of_byte_budgets_need_no_package() -> None:
    assert latex_escape("≤ 1,024 B") == "$\\leq$ 1,024 B"
