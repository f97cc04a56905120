"""What memory is: pure data and rules, no input or output.

The modules are imported by name (`memos_vllm.domain.memory`); nothing here reads a clock, a file,
the network or the environment.
"""
