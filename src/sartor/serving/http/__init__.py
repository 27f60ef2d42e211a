"""OpenAI-compatible HTTP over `dispatch`: the front process, which has no torch and computes nothing itself.

seams.py     what it needs of the house: who answers, who may come in, where receipts lie
server.py    sockets, signals, drain; protocol.py cuts off slow clients
guard.py     the first and last of every request: id, host, origin, key, the log line, the numbers, a bug
bodies.py    a body within its limits -> JSON that is what it says
asked.py     what may be asked; said.py what is answered; faults.py which error is which status
turns.py     a question -> Request; replies.py Answers -> objects or chunks; streams.py server-sent events
routes/      one file a route
"""
