"""How the queue's tables came to be, revision by revision; `queue.Queue.open` runs what is lacking."""
