"""The work behind the sub-commands: parts of all stages put together. Stands above the stages, like `pipeline`."""
