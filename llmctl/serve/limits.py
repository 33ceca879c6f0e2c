"""What a request may ask for, and why no more; each limit is checked before anything of that size is allocated."""

from __future__ import annotations

# The body, counted as it arrives: 128 prompts of 8,192 token ids spelled in JSON are 8 MB.
MAX_BODY_BYTES = 16 * 2**20

# A client that opens a request and then sends its body a byte a minute holds a connection for at most this long.
BODY_SECONDS = 30.0

# A connection that has not sent its first request's headers by then is closed.
HEADER_SECONDS = 20.0

# An idle connection is kept for longer than clients keep it (httpx: 5 s), so that none is closed as a request arrives.
KEEP_ALIVE_SECONDS = 75

# OpenAI's own limit on `n`. Each answer is a sequence with a cache of its own, one after another in the queue.
MAX_N = 128

# Answers to one request, prompts times n: one request may fill half of the queue, never all of it.
MAX_SEQUENCES = 128

# Texts in one request for embeddings, and their tokens together: OpenAI's own limits, which clients batch by.
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000

# Sequences waiting for a slot, over all clients. One costs its ids; the first one too many is told to come again.
MAX_WAITING = 256

# Sequences that hold a cache and take turns, token by token. More would only make each of them slower.
SLOTS = 4

# OpenAI allows 5 alternatives on completions and 20 on chat; evaluation harnesses ask up to 20 of both.
MAX_LOGPROBS = 20

# OpenAI documents 4 stop strings; harnesses pass a dozen. Each is searched for at every token.
MAX_STOPS = 16
MAX_STOP_CHARS = 256

# OpenAI's limit on entries of logit_bias.
MAX_LOGIT_BIAS = 1024

# A conversation: a template walks over every message.
MAX_MESSAGES = 2048

# Connections at once, idle ones included; the next one gets a 503. Well below the usual 1,024 open files of a process.
MAX_CONNECTIONS = 512

# Seconds an answer that has begun may go on after SIGTERM: `docker stop` and systemd kill after 10.
DRAIN_SECONDS = 8.0

# What Retry-After says, in seconds: while loading, and when the queue is full.
RETRY_AFTER = 1
