"""`whence compare`: how far finished runs agree on the same queries.

arguments   the words of the command
runs        the folders, their queries, what differs between their settings
matching    which sequences of two runs are the same
scores      scores of several runs side by side, streamed; moments and samples of them
agreement   overlap of the top sequences and correlations, by pair of runs and query
wording     what the measures are, in words
output      compare.json, tables, plots
page        compare.html
"""

from __future__ import annotations
