"""The TTFT benchmark: real servers, a grid of situations, one JSON record, Markdown and plots.

plan      which cells and situations, and how long that takes
fleet     the servers, of which one runs while the others are stopped
measure   rounds in random order, every claim of a row read back from the server
measurement  the rounds, then answers, costs, load and floods, under one progress bar
peers     other ways to keep KV, each in an environment of its own
load      many chats at once, by vLLM's own bench client
simulation  traces of 100,000 cubes through tiers that this machine does not have
record    the JSON file: every raw sample, the machine, the versions
report    Markdown and plots of one or more records
"""
