"""`inbox:DIR`: what people said of a team's replies -> Examples, and a Drop with its reason for everything else.

terms.py  what is wanted of an inbox, and how far one key is trusted
lines.py  files -> one fact a line; a later line of the same key on the same reply stands for both
known.py  replies of which it is known whether they are good
trust.py  whose ratings contradict the others'; shares.py how much of the rows one key may give
reading.py the whole: which line becomes a row, and the row
"""
