"""Tensor-parallel inference workers. Run them with the `onecast` command or under torchrun.

To build an engine of one's own: `Scheduler` decides, `prepare_inputs` makes the step's frame,
`StepExecutor` carries it out on a rank, `Engine` is the driver's loop around them.
"""
