"""The stages of a trace: one file each, a function `run(context) -> StageResult`."""
