"""RULER: the 13 tasks of NVIDIA/RULER from an own, seeded builder.

    tasks.py      the 13 tasks: prompts, generated tokens, scoring, reduced variants
    words.py      keys, values, variable names and word lists
    haystack.py   running text cut into sentences and words
    needles.py    niah_*: keys and values hidden in noise, text or other needles
    chains.py     vt: chains of variable assignments
    counted.py    cwe and fwe: lists of words that must be counted
    questions.py  qa_*: question answering among documents
    sizing.py     the largest context that fits, by binary search on exact token counts
    generate.py   documents of one (task, length)
    store.py      the same as files that are reused
    build.py      the concrete tasks of a study

Source: Hsieh et al. 2024 (arXiv 2404.06654); github.com/NVIDIA/RULER at c3f5e3b, Apache-2.0.
"""
