"""The memory operating system: cubes, memories, artifacts, access, audit and jobs in a catalog."""
