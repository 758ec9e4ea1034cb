"""The sub-commands of `fastdit`: each module has `add_arguments(parser)` and `run(args)`."""
