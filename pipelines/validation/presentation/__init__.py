"""What a validation shows: sections of tables, from `validation.json` alone, and the same as text, page, CSV and plots.

wording   names and colours of methods
tables    columns, cells, sections
sections  which sections a validation has, and what each number means
figures   plots by matplotlib
markdown  `validation.md` and the terminal
page      `validation.html`
"""
